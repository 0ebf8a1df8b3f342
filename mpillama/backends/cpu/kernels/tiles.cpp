// Products of many tokens on AMX: panels are expanded to bf16 a few at a time, while those before them meet slices of the tokens,
// and all stays in the second-level cache.
#include "tiles.h"

#if MPILLAMA_AMX

namespace mpillama {
namespace {

// Measured best on Sapphire Rapids, whose cores have second-level caches of 2 MiB: a piece of the columns of so many tokens, of
// so many panels (twice: the next are expanded meanwhile) and of what they make are a quarter of a MiB each.
constexpr size_t slice_tokens = 256, piece_groups = 16, task_panels = 16;
static_assert(task_panels <= Expansion::most_panels, "a task is expanded while another is multiplied");
constexpr size_t tile_block = 32;  // tokens, and rows, of what `multiply` makes at a time

// Below this the int8 kernels are faster, which compute no more tokens than there are.
constexpr size_t least_tokens = 24;

constexpr size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

bool wants_tiles(const Pool& pool, const PackedWeight& w, size_t n_tokens) {
  return pool.level() == Level::amx && amx_kernels.expand[w.type] && n_tokens >= least_tokens && w.n_units > 0;
}

TileProduct::TileProduct(Pool& pool, std::vector<Product> products, const Input& x, const Plan& plan,
                         const std::vector<Segment>& segments)
    : pool_(pool),
      products_(std::move(products)),
      n_groups_(products_[0].w->n_groups),
      plan_(plan) {
  // Tokens of each segment as tiles, padded with zeros to pairs of tiles.
  std::vector<size_t> first_row{0};
  for (const Segment& s : segments) {
    for (size_t m = 0; m < s.count; m += slice_tokens)
      slices_.push_back({&s, m, std::min(s.count, m + slice_tokens), first_row.back() + m});
    first_row.push_back(first_row.back() + round_up(s.count, tile_block));
  }
  const size_t n_rows = first_row.back();
  tokens_ = static_cast<uint16_t*>(pool.scratch(1).get(n_rows * n_groups_ * 64));
  pool.parallel_for(n_rows / 16, 1, [&](size_t begin, size_t end) {
    constexpr size_t step = 8;  // groups: what is written stays in the first-level cache until lines are full
    for (size_t tile = begin; tile < end; tile++) {
      const size_t row = 16 * tile;
      const size_t segment = size_t(std::upper_bound(first_row.begin(), first_row.end(), row) - first_row.begin()) - 1;
      const Segment& s = segments[segment];
      uint16_t* tiles = tokens_ + tile * n_groups_ * tile_values;
      for (size_t g0 = 0; g0 < n_groups_; g0 += step) {
        const size_t g1 = std::min(n_groups_, g0 + step);
        for (size_t r = 0, i = row - first_row[segment]; r < 16; r++, i++) {
          if (i < s.count) {
            for_groups(x, plan.x_rows[s.first + i], n_groups_, g0, g1, [&](const float* values, size_t g, size_t n) {
              amx_kernels.tile_row(values, n, int(r), tiles + g * tile_values);
            });
          } else {
            for (size_t g = g0; g < g1; g++) std::memset(tiles + g * tile_values + r * 32, 0, 64);
          }
        }
      }
    }
  });
}

void TileProduct::run() {
  run_tasks(1, [](const Product& product, const float* c, size_t, size_t row, size_t column, size_t n) {
    std::memcpy(product.y + row * product.w->n_rows + column, c, n * sizeof(float));
  });
}

void TileProduct::run_gated(GatedFn gated, Activation activation, float* y) {
  run_tasks(2, [=](const Product& gate, const float* c, size_t to_up, size_t row, size_t column, size_t n) {
    gated(activation, c, c + to_up, y + row * gate.w->n_rows + column, n);
  });
}

template <class Put>
void TileProduct::run_tasks(size_t n_together, const Put& put) {
  // A task: so many panels of a product, or of each of those that are taken together, times a slice. Panels are multiplied in
  // pairs; fewer are taken where there would not be enough tasks for all threads.
  size_t n_panels_of_all = 0;
  for (const Product& p : products_) n_panels_of_all += p.w->n_panels;
  const size_t share = n_panels_of_all * slices_.size() / (4 * size_t(pool_.size()));
  const size_t step = std::max<size_t>(2, std::min(task_panels, share) / n_together / 2 * 2);
  std::vector<size_t> first_task{0};
  for (size_t i = 0; i < products_.size(); i += n_together)
    first_task.push_back(first_task.back() + round_up(products_[i].w->n_panels, step) / step);
  const size_t n_tasks = first_task.back() * slices_.size(), n_pieces = round_up(n_groups_, piece_groups) / piece_groups;
  const auto piece_at = [&](size_t task, size_t number) -> Piece {
    const size_t at = task % first_task.back();
    const size_t which = size_t(std::upper_bound(first_task.begin(), first_task.end(), at) - first_task.begin()) - 1;
    const Product* products = &products_[which * n_together];
    const size_t p0 = (at - first_task[which]) * step, g0 = number * piece_groups;
    return {number, &slices_[task / first_task.back()], products, p0, std::min(step, products->w->n_panels - p0),
            g0,     std::min(piece_groups, n_groups_ - g0)};
  };

  // Rows of c that lie a power of two apart would all fall into one set of the cache.
  const size_t c_stride = step * 16 + 16, c_values = c_stride * slice_tokens, b_values = step * piece_groups * tile_values;
  const size_t own_bytes = round_up(n_together * (2 * b_values * sizeof(uint16_t) + c_values * sizeof(float)), 4096);
  uint8_t* buffers = static_cast<uint8_t*>(pool_.scratch(2).get(size_t(pool_.size()) * own_bytes));
  std::atomic<size_t> next{0};
  pool_.run([&](int thread) {
    float* c = reinterpret_cast<float*>(buffers + size_t(thread) * own_bytes);
    uint16_t* now = reinterpret_cast<uint16_t*>(c + n_together * c_values);
    uint16_t* then = now + n_together * b_values;
    Expansion expansion;
    const auto expand = [&](const Piece& piece, uint16_t* tiles) {
      for (size_t i = 0; i < n_together; i++)
        for (size_t p = 0; p < piece.n_panels; p++) {
          const PackedWeight& w = *piece.products[i].w;
          expansion.add(amx_kernels.expand[w.type], w.panel(piece.slice->segment->mat, piece.p0 + p), piece.g0,
                        piece.g0 + piece.n_groups, tiles + i * b_values + p * piece.n_groups * tile_values);
        }
    };
    const auto take = [&] { return next.fetch_add(1, std::memory_order_relaxed); };
    size_t task = take();
    if (task >= n_tasks) return;
    TileConfig before;
    amx_kernels.begin(&before);
    Piece piece = piece_at(task, 0);
    expand(piece, now);
    expansion.finish();
    for (bool more = true; more;) {
      const Piece current = piece;
      const size_t number = (current.number + 1) % n_pieces;
      if (number == 0) task = take();
      more = task < n_tasks;
      if (more) {
        piece = piece_at(task, number);
        expand(piece, then);
      }
      const Slice& slice = *current.slice;
      // A pair of panels meets all blocks of tokens, and meanwhile two panels are to be expanded, a step at every fourth group.
      expansion.pace = 4 * 2 / (round_up(slice.end - slice.begin, tile_block) / tile_block);
      const size_t column = 16 * current.p0, n_columns = std::min(16 * current.n_panels, current.products->w->n_rows - column);
      for (size_t m = slice.begin; m < slice.end; m += tile_block) {
        const uint16_t* tokens = tokens_ + ((slice.row + m - slice.begin) / 16 * n_groups_ + current.g0) * tile_values;
        float* rows = c + (m - slice.begin) * c_stride;
        for (size_t i = 0; i < n_together; i++) {
          // An odd panel is paired with itself.
          const auto tiles_of = [&](size_t p) {
            return now + i * b_values + std::min(p, current.n_panels - 1) * current.n_groups * tile_values;
          };
          for (size_t p = 0; p < current.n_panels; p += 2)
            amx_kernels.multiply(tokens, n_groups_, tiles_of(p), tiles_of(p + 1), current.n_groups, rows + i * c_values + 16 * p,
                                 c_stride, current.number > 0, expansion);
        }
        if (number) continue;
        for (size_t r = 0; r < std::min(tile_block, slice.end - m); r++)
          put(*current.products, rows + r * c_stride, c_values, plan_.y_rows[slice.segment->first + m + r], column, n_columns);
      }
      expansion.finish();
      std::swap(now, then);
    }
    amx_kernels.end(&before);
  });
}

}  // namespace mpillama

#endif
