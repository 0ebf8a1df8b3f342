#include "matmul.h"

#include <numeric>
#include <stdexcept>

#include "kernels.h"
#include "plan.h"

namespace mpillama {

const Kernels& kernels_of(Level level) {
#if MPILLAMA_X86
  if (level >= Level::avx512) return avx512_kernels;
  if (level == Level::avx2) return avx2_kernels;
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

class PanelProduct {
 public:
  PanelProduct(Pool& pool, const PackedWeight& w, const Input& x, const Plan& plan, const std::vector<Segment>& segments)
      : pool_(pool), w_(w), x_(x), plan_(plan), segments_(segments), kernels_(kernels_of(pool.level())) {}

  void run(float* y) {
    make_blocks();
    prepare();
    const size_t n_tasks = segments_.size() * w_.n_panels, n_threads = size_t(pool_.size());
    // Tokens in many rounds over the same panels want these in the cache; a single round wants long sequential reads.
    size_t grain = n_tasks / (8 * n_threads);
    if (largest_ > size_t(max_tokens)) grain = std::min(grain, most_bytes / std::max<size_t>(1, w_.panel_bytes));
    grain = std::max(grain, least_bytes / std::max<size_t>(1, w_.panel_bytes));
    pool_.parallel_for(n_tasks, grain, [&](size_t begin, size_t end) {
      while (begin < end) {
        const size_t segment = begin / w_.n_panels, p = begin % w_.n_panels;
        const size_t n = std::min(end - begin, w_.n_panels - p);
        panels(segment, p, p + n, y);
        begin += n;
      }
    });
  }

 private:
  void make_blocks() {
    const size_t n_groups = this->n_groups();
    size_t bytes = 0;
    for (const Segment& s : segments_) {
      first_block_.push_back(blocks_.size());
      largest_ = std::max(largest_, s.count);
      for (size_t done = 0; done < s.count;) {
        int log = 4;
        while ((size_t(1) << log) > s.count - done || !kernels_.panel[w_.type][log]) log--;
        blocks_.push_back({s.first + done, size_t(1) << log, log, nullptr});
        done += blocks_.back().n;
        bytes += n_groups * group_size(blocks_.back().n);
      }
    }
    first_block_.push_back(blocks_.size());
    // Kernels may look at the first byte after the last group.
    uint8_t* data = static_cast<uint8_t*>(pool_.scratch(0).get(bytes + 64));
    for (TokenBlock& block : blocks_) {
      block.data = data;
      data += n_groups * group_size(block.n);
    }
  }

  void prepare() {
    const PrepareFn fn = is_float(w_.format)      ? kernels_.copy
                         : is_permuted(w_.format) ? kernels_.quantize_permuted
                                                  : kernels_.quantize;
    constexpr size_t worth = 1 << 15;  // values that are prepared faster than a thread is told of them
    size_t n = 0;
    for (const TokenBlock& block : blocks_) n += block.n;
    const size_t average = std::max<size_t>(1, blocks_.empty() ? 1 : n / blocks_.size());
    const size_t grain = worth / std::max<size_t>(1, w_.n_in * average);
    pool_.parallel_for(blocks_.size(), grain, [&](size_t begin, size_t end) {
      for (size_t b = begin; b < end; b++) {
        const TokenBlock& block = blocks_[b];
        uint8_t* data = const_cast<uint8_t*>(block.data);
        for (size_t i = 0; i < block.n; i++)
          for_groups(x_, plan_.x_rows[block.first + i], n_groups(), [&](const float* values, size_t g, size_t count) {
            fn(values, count, int(block.n), int(i), data + g * group_size(block.n));
          });
      }
    });
  }

  void panels(size_t segment, size_t begin, size_t end, float* y) const {
    const size_t last_block = first_block_[segment + 1];
    const size_t row_bytes = std::max<size_t>(1, n_groups() * group_size(1));
    float* out[max_tokens];
    for (size_t b = first_block_[segment]; b < last_block;) {
      size_t stop = b, bytes = 0;
      while (stop < last_block && (stop == b || bytes + blocks_[stop].n * row_bytes <= token_bytes))
        bytes += blocks_[stop++].n * row_bytes;
      for (size_t p = begin; p < end; p++) {
        const uint8_t* panel = w_.panel(segments_[segment].mat, p);
        const int n_rows = int(std::min<size_t>(16, w_.n_rows - 16 * p));
        for (size_t i = b; i < stop; i++) {
          const TokenBlock& block = blocks_[i];
          for (size_t t = 0; t < block.n; t++) out[t] = y + plan_.y_rows[block.first + t] * w_.n_rows + 16 * p;
          kernels_.panel[w_.type][block.log](w_.codebook(), panel, w_.n_units, block.data, out, n_rows);
        }
      }
      b = stop;
    }
  }

  size_t n_groups() const { return w_.n_units * size_t(w_.format.unit / 32); }
  size_t group_size(size_t n) const { return is_float(w_.format) ? float_group_bytes(n) : int_group_bytes(n); }

  Pool& pool_;
  const PackedWeight& w_;
  const Input& x_;
  const Plan& plan_;
  const std::vector<Segment>& segments_;
  const Kernels& kernels_;
  std::vector<TokenBlock> blocks_;
  std::vector<size_t> first_block_;
  size_t largest_ = 0;
};

void multiply(Pool& pool, const PackedWeight& w, const Input& x, const Plan& plan, float* y) {
  if (w.n_rows == 0 || plan.segments.empty()) return;
#if MPILLAMA_AMX
  std::vector<Segment> tiles, rest;
  for (const Segment& s : plan.segments) (wants_tiles(pool, w, s.count) ? tiles : rest).push_back(s);
  if (!tiles.empty()) multiply_tiles(pool, w, x, plan, tiles, y);
  if (!rest.empty()) PanelProduct(pool, w, x, plan, rest).run(y);
#else
  PanelProduct(pool, w, x, plan, plan.segments).run(y);
#endif
}

}  // namespace

void linear(Pool& pool, const PackedWeight& w, const Input& x, float* y) {
  if (x.n_rows == 0) return;
  const auto lock = pool.lock();
  Plan plan;
  plan.segments.push_back({0, 0, x.n_rows});
  plan.x_rows.resize(x.n_rows);
  std::iota(plan.x_rows.begin(), plan.x_rows.end(), size_t(0));
  plan.y_rows = plan.x_rows;
  multiply(pool, w, x, plan, y);
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

void embedding(Pool& pool, const PackedWeight& w, const int64_t* index, size_t n, float* y) {
  const auto lock = pool.lock();
  const RowFn read_row = kernels_of(pool.level()).row[w.type];
  pool.parallel_for(n, 8, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) {
      float* row = y + i * w.n_in;
      if (index[i] >= 0 && size_t(index[i]) < w.n_rows) {
        read_row(w.codebook(), w.panel(0, size_t(index[i]) / 16), int(index[i] % 16), w.n_in, row);
      } else {
        std::fill(row, row + w.n_in, 0.0f);
      }
    }
  });
}

}  // namespace mpillama
