#include "matmul.h"

#include <memory>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "kernels.h"
#include "plan.h"
#include "tiles.h"

namespace mpillama {

const Kernels& kernels_of(Level level) {
#if MPILLAMA_X86
  if (level >= Level::avx512) return avx512_kernels;
  if (level == Level::avx2) return avx2_kernels;
#elif MPILLAMA_ARM
#if MPILLAMA_SVE512
  if (level == Level::sve512) return sve512_kernels;
#endif
#if MPILLAMA_I8MM
  if (level == Level::i8mm) return i8mm_kernels;
#endif
  if (level == Level::dotprod) return dotprod_kernels;
  if (level == Level::neon) return neon_kernels;
#endif
  (void)level;
  return scalar_kernels;
}

namespace {

// Prepared tokens that stay in a core's cache while panels pass by.
constexpr size_t token_bytes = 256 << 10;
// A piece of work: large enough to be worth handing out, small enough to leave something for the other threads.
constexpr size_t least_bytes = 16 << 10, most_bytes = 256 << 10;

// Tokens that go through a kernel together.
struct TokenBlock {
  size_t first, n;  // places of the plan
  int log;
  const uint8_t* data;
};

// What must be done to x before it meets a matrix.
enum class Form { floats, int8, int8_permuted };

Form form_of(const Format& f) {
  return is_float(f) ? Form::floats : is_permuted(f) ? Form::int8_permuted : Form::int8;
}

// Whether x prepared for one matrix can meet the other, by kernels for the same numbers of tokens.
bool alike(const PackedWeight& a, const PackedWeight& b) {
  return form_of(a.format) == form_of(b.format) && a.n_groups == b.n_groups;
}

// Matrices that are `alike`, times the same tokens.
class PanelProduct {
 public:
  PanelProduct(Pool& pool, std::vector<Product> products, const Input& x, const Plan& plan,
               const std::vector<Segment>& segments)
      : pool_(pool),
        products_(std::move(products)),
        form_(form_of(products_[0].w->format)),
        n_groups_(products_[0].w->n_groups),
        x_(x),
        plan_(plan),
        segments_(segments),
        kernels_(kernels_of(pool.level())) {}

  void run() {
    make_blocks();
    prepare();
    // The panels of all segments of all products.
    std::vector<size_t> first{0};
    for (const Product& p : products_) first.push_back(first.back() + segments_.size() * p.w->n_panels);
    pool_.parallel_for_shrinking(first.back(), least(1), most(1), [&](size_t begin, size_t end) {
      for (size_t i = 0; i < products_.size(); i++) {
        const size_t n_panels = products_[i].w->n_panels, stop = std::min(end, first[i + 1]);
        while (begin >= first[i] && begin < stop) {
          const size_t at = begin - first[i], p = at % n_panels, n = std::min(stop - begin, n_panels - p);
          panels(products_[i], at / n_panels, p, p + n);
          begin += n;
        }
      }
    });
  }

  // For two products of the same shape and all tokens: y = act(the first) * the second; their own y are used up.
  void run_gated(void (*gated)(Activation, const float*, const float*, float*, size_t), Activation activation, float* y) {
    make_blocks();
    prepare();
    const Product &gate = products_[0], &up = products_[1];
    pool_.parallel_for_shrinking(gate.w->n_panels, least(2), most(2), [&](size_t begin, size_t end) {
      panels(gate, 0, begin, end);
      panels(up, 0, begin, end);
      const size_t n_rows = gate.w->n_rows, from = 16 * begin, n = std::min(n_rows, 16 * end) - from;
      for (size_t i = from; i < x_.n_rows * n_rows; i += n_rows) gated(activation, gate.y + i, up.y + i, y + i, n);
    });
  }

 private:
  // How many panels make a piece of work, each of which is one of `n_matrices`.
  size_t least(size_t n_matrices) const { return least_bytes / bytes_of(n_matrices); }
  // Tokens in many rounds over the same panels want these in the cache; a single round wants long sequential reads.
  size_t most(size_t n_matrices) const { return largest_ > size_t(max_tokens) ? most_bytes / bytes_of(n_matrices) : SIZE_MAX; }
  size_t bytes_of(size_t n_matrices) const { return std::max<size_t>(1, products_[0].w->panel_bytes * n_matrices); }

  void make_blocks() {
    size_t bytes = 0;
    for (const Segment& s : segments_) {
      first_block_.push_back(blocks_.size());
      largest_ = std::max(largest_, s.count);
      for (size_t done = 0; done < s.count;) {
        int log = 4;
        while ((size_t(1) << log) > s.count - done || !kernels_.panel[products_[0].w->type][log]) log--;
        blocks_.push_back({s.first + done, size_t(1) << log, log, nullptr});
        done += blocks_.back().n;
        bytes += n_groups_ * group_size(blocks_.back().n);
      }
    }
    first_block_.push_back(blocks_.size());
    // Kernels may look at the first byte after the last group.
    uint8_t* data = static_cast<uint8_t*>(pool_.scratch(0).get(bytes + 64));
    for (TokenBlock& block : blocks_) {
      block.data = data;
      data += n_groups_ * group_size(block.n);
    }
  }

  void prepare() {
    const PrepareFn fn = form_ == Form::floats ? kernels_.copy
                         : form_ == Form::int8 ? kernels_.quantize
                                               : kernels_.quantize_permuted;
    constexpr size_t worth = 1 << 15;  // values that are prepared faster than a thread is told of them
    size_t n = 0;
    for (const TokenBlock& block : blocks_) n += block.n;
    const size_t average = std::max<size_t>(1, blocks_.empty() ? 1 : n / blocks_.size());
    const size_t grain = worth / std::max<size_t>(1, 32 * n_groups_ * average);
    pool_.parallel_for(blocks_.size(), grain, [&](size_t begin, size_t end) {
      for (size_t b = begin; b < end; b++) {
        const TokenBlock& block = blocks_[b];
        uint8_t* data = const_cast<uint8_t*>(block.data);
        for (size_t i = 0; i < block.n; i++)
          for_groups(x_, plan_.x_rows[block.first + i], n_groups_, 0, n_groups_, [&](const float* values, size_t g, size_t count) {
            fn(values, count, int(block.n), int(i), data + g * group_size(block.n));
          });
      }
    });
  }

  void panels(const Product& product, size_t segment, size_t begin, size_t end) const {
    const PackedWeight& w = *product.w;
    const size_t last_block = first_block_[segment + 1];
    const size_t row_bytes = std::max<size_t>(1, n_groups_ * group_size(1));
    float* out[max_tokens];
    // What kernels would have asked for if they came from the panel before.
    const uint8_t* start = w.panel(segments_[segment].mat, begin);
    for (size_t i = 0; i < lookahead.bytes; i += 64) fetch_line(start + i);
    for (size_t b = first_block_[segment]; b < last_block;) {
      size_t stop = b, bytes = 0;
      while (stop < last_block && (stop == b || bytes + blocks_[stop].n * row_bytes <= token_bytes))
        bytes += blocks_[stop++].n * row_bytes;
      for (size_t p = begin; p < end; p++) {
        const uint8_t* panel = w.panel(segments_[segment].mat, p);
        const int n_rows = int(std::min<size_t>(16, w.n_rows - 16 * p));
        for (size_t i = b; i < stop; i++) {
          const TokenBlock& block = blocks_[i];
          for (size_t t = 0; t < block.n; t++) out[t] = product.y + plan_.y_rows[block.first + t] * w.n_rows + 16 * p;
          kernels_.panel[w.type][block.log](w.codebook(), panel, w.n_units, block.data, out, n_rows);
        }
      }
      b = stop;
    }
  }

  size_t group_size(size_t n) const { return form_ == Form::floats ? float_group_bytes(n) : int_group_bytes(n); }

  Pool& pool_;
  const std::vector<Product> products_;
  const Form form_;
  const size_t n_groups_;
  const Input& x_;
  const Plan& plan_;
  const std::vector<Segment>& segments_;
  const Kernels& kernels_;
  std::vector<TokenBlock> blocks_;
  std::vector<size_t> first_block_;
  size_t largest_ = 0;
};

// Whether tiles are the faster way for so many tokens.
bool tiles_for([[maybe_unused]] const Pool& pool, [[maybe_unused]] const PackedWeight& w, [[maybe_unused]] size_t n) {
#if MPILLAMA_AMX
  return wants_tiles(pool, w, n);
#else
  return false;
#endif
}

void multiply(Pool& pool, const PackedWeight& w, const Input& x, const Plan& plan, float* y) {
  if (w.n_rows == 0 || plan.segments.empty()) return;
  std::vector<Segment> tiles, rest;
  for (const Segment& s : plan.segments) (tiles_for(pool, w, s.count) ? tiles : rest).push_back(s);
#if MPILLAMA_AMX
  if (!tiles.empty()) TileProduct(pool, {{&w, y}}, x, plan, tiles).run();
#endif
  if (!rest.empty()) PanelProduct(pool, {{&w, y}}, x, plan, rest).run();
}

// All tokens meet matrix 0.
Plan whole_plan(size_t n) {
  Plan plan;
  plan.segments.push_back({0, 0, n});
  plan.x_rows.resize(n);
  std::iota(plan.x_rows.begin(), plan.x_rows.end(), size_t(0));
  plan.y_rows = plan.x_rows;
  return plan;
}

}  // namespace

void linear(Pool& pool, const PackedWeight& w, const Input& x, float* y) { linears(pool, {{&w, y}}, x); }

void linears(Pool& pool, const std::vector<Product>& products, const Input& x) {
  if (x.n_rows == 0) return;
  const auto lock = pool.lock();
  const Plan plan = whole_plan(x.n_rows);
  std::vector<Product> together, on_tiles, rest;
  for (const Product& p : products) {
    if (p.w->n_rows == 0) continue;
    const bool tiles = tiles_for(pool, *p.w, x.n_rows);
    std::vector<Product>& others = tiles ? on_tiles : together;
    const bool fits = others.empty() || (tiles ? p.w->n_groups == others[0].w->n_groups : alike(*p.w, *others[0].w));
    (fits ? others : rest).push_back(p);
  }
  if (!together.empty()) PanelProduct(pool, together, x, plan, plan.segments).run();
#if MPILLAMA_AMX
  if (!on_tiles.empty()) TileProduct(pool, on_tiles, x, plan, plan.segments).run();
#endif
  for (const Product& p : rest) multiply(pool, *p.w, x, plan, p.y);
}

void gated_linear(Pool& pool, Activation activation, const PackedWeight& gate, const PackedWeight& up, const Input& x,
                  float* y) {
  if (x.n_rows == 0 || gate.n_rows == 0) return;
  const auto lock = pool.lock();
  const Plan plan = whole_plan(x.n_rows);
  const auto fn = elementwise_kernels_of(pool.level()).gated;
  const bool gate_on_tiles = tiles_for(pool, gate, x.n_rows), up_on_tiles = tiles_for(pool, up, x.n_rows);
#if MPILLAMA_AMX
  if (gate_on_tiles && up_on_tiles && gate.n_groups == up.n_groups) {
    TileProduct(pool, {{&gate, nullptr}, {&up, nullptr}}, x, plan, plan.segments).run_gated(fn, activation, y);
    return;
  }
#endif
  const size_t n = x.n_rows * gate.n_rows;
  if (gate_on_tiles || up_on_tiles || !alike(gate, up)) {
    // Tiles want the pool's temporary memory for themselves.
    const std::unique_ptr<float[]> other(new float[n]);
    multiply(pool, gate, x, plan, y);
    multiply(pool, up, x, plan, other.get());
    fn(activation, y, other.get(), y, n);
  } else {
    float* temporary = static_cast<float*>(pool.scratch(1).get(2 * n * sizeof(float)));
    PanelProduct(pool, {{&gate, temporary}, {&up, temporary + n}}, x, plan, plan.segments).run_gated(fn, activation, y);
  }
}

void expert_linear(Pool& pool, const PackedWeight& w, const Input& x, size_t n_tokens, size_t n_used,
                   const int64_t* experts, float* y) {
  const size_t n = n_tokens * n_used;
  if (n == 0) return;
  const auto lock = pool.lock();
  // Counting sort by expert.
  std::vector<size_t> begin(w.n_mats + 1, 0);
  for (size_t i = 0; i < n; i++) {
    if (experts[i] < 0 || size_t(experts[i]) >= w.n_mats) throw std::invalid_argument("no such expert");
    begin[size_t(experts[i]) + 1]++;
  }
  Plan plan;
  for (size_t e = 0; e < w.n_mats; e++) {
    begin[e + 1] += begin[e];
    if (begin[e + 1] > begin[e]) plan.segments.push_back({e, begin[e], begin[e + 1] - begin[e]});
  }
  plan.x_rows.resize(n);
  plan.y_rows.resize(n);
  for (size_t i = 0; i < n; i++) {
    const size_t place = begin[size_t(experts[i])]++;
    plan.x_rows[place] = x.n_rows == n_tokens ? i / n_used : i;
    plan.y_rows[place] = i;
  }
  multiply(pool, w, x, plan, y);
}

void embedding(Pool& pool, const PackedWeight& w, const int32_t* tokens, int64_t first, size_t n, float* y) {
  const auto lock = pool.lock();
  const RowFn read_row = kernels_of(pool.level()).row[w.type];
  pool.parallel_for(n, 8, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) {
      float* row = y + i * w.n_in;
      const int64_t index = tokens[i] - first;
      if (index >= 0 && size_t(index) < w.n_rows) {
        read_row(w.codebook(), w.panel(0, size_t(index) / 16), int(index % 16), w.n_in, row);
      } else {
        std::fill(row, row + w.n_in, 0.0f);
      }
    }
  });
}

}  // namespace mpillama
