// Products of many tokens on AMX: panels are expanded to bf16 a few at a time and meet slices of the tokens that stay in
// the second-level cache.
#include "kernels.h"
#include "plan.h"

#if MPILLAMA_AMX

namespace mpillama {
namespace {

// Measured best on Sapphire Rapids: 256 tokens x 2048 columns in bf16 are half of a core's second-level cache, four
// expanded panels an eighth.
constexpr size_t slice_tokens = 256, slice_groups = 64, slice_panels = 4;
// Rows of c that lie a power of two apart would all fall into one set of the cache.
constexpr size_t c_stride = slice_panels * 16 + 16;
constexpr size_t tile_values = 512;

// Below this the int8 kernels are faster, which compute no more tokens than there are.
constexpr size_t least_tokens = 20;

size_t round_up(size_t n, size_t step) { return (n + step - 1) / step * step; }

}  // namespace

bool wants_tiles(const Pool& pool, const PackedWeight& w, size_t n_tokens) {
  return pool.level() == Level::amx && amx_kernels.expand[w.type] && n_tokens >= least_tokens && w.n_units > 0;
}

void multiply_tiles(Pool& pool, const PackedWeight& w, const Input& x, const Plan& plan,
                    const std::vector<Segment>& segments, float* y) {
  const size_t n_groups = w.n_units * size_t(w.format.unit / 32);
  // Tokens of each segment as tiles, padded with zeros to pairs of tiles.
  std::vector<size_t> first_row{0};
  for (const Segment& s : segments) first_row.push_back(first_row.back() + round_up(s.count, 32));
  const size_t n_rows = first_row.back();
  uint16_t* a = static_cast<uint16_t*>(pool.scratch(1).get(n_rows * n_groups * 64));
  pool.parallel_for(n_rows, 4, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; row++) {
      const size_t segment = size_t(std::upper_bound(first_row.begin(), first_row.end(), row) - first_row.begin()) - 1;
      const size_t i = row - first_row[segment];
      uint16_t* tiles = a + row / 16 * n_groups * tile_values;
      if (i < segments[segment].count) {
        for_groups(x, plan.x_rows[segments[segment].first + i], n_groups, [&](const float* values, size_t g, size_t n) {
          amx_kernels.tile_row(values, n, int(row % 16), tiles + g * tile_values);
        });
      } else {
        for (size_t g = 0; g < n_groups; g++) std::memset(tiles + g * tile_values + row % 16 * 32, 0, 64);
      }
    }
  });

  const size_t n_slices = round_up(w.n_panels, slice_panels) / slice_panels;
  constexpr size_t b_values = slice_panels * slice_groups * tile_values, c_values = slice_tokens * c_stride;
  constexpr size_t own_bytes = b_values * 2 + c_values * 4;
  uint8_t* buffers = static_cast<uint8_t*>(pool.scratch(2).get(size_t(pool.size()) * own_bytes));
  std::atomic<size_t> next{0};
  pool.run([&](int thread) {
    uint16_t* b = reinterpret_cast<uint16_t*>(buffers + size_t(thread) * own_bytes);
    float* c = reinterpret_cast<float*>(b + b_values);
    amx_kernels.begin();
    for (size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < segments.size() * n_slices;) {
      const Segment& s = segments[task / n_slices];
      const size_t p0 = task % n_slices * slice_panels, n_panels = std::min(slice_panels, w.n_panels - p0);
      // An odd panel is paired with itself.
      const auto tiles_of = [&](size_t p, size_t n) { return b + std::min(p, n_panels - 1) * n * tile_values; };
      for (size_t m0 = 0; m0 < s.count; m0 += slice_tokens) {
        const size_t m1 = std::min(s.count, m0 + slice_tokens);
        for (size_t g0 = 0; g0 < n_groups; g0 += slice_groups) {
          const size_t n = std::min(slice_groups, n_groups - g0);
          for (size_t p = 0; p < n_panels; p++)
            amx_kernels.expand[w.type](w.panel(s.mat, p0 + p), g0, g0 + n, b + p * n * tile_values);
          for (size_t m = m0; m < m1; m += 32) {
            const uint16_t* tokens = a + ((first_row[task / n_slices] + m) / 16 * n_groups + g0) * tile_values;
            for (size_t p = 0; p < n_panels; p += 2)
              amx_kernels.multiply(tokens, n_groups, tiles_of(p, n), tiles_of(p + 1, n), n, c + (m - m0) * c_stride + 16 * p,
                                   c_stride, g0 > 0);
          }
        }
        const size_t column = 16 * p0, n_columns = std::min(16 * n_panels, w.n_rows - column);
        for (size_t m = m0; m < m1; m++)
          std::memcpy(y + plan.y_rows[s.first + m] * w.n_rows + column, c + (m - m0) * c_stride, n_columns * sizeof(float));
      }
    }
    amx_kernels.end();
  });
}

}  // namespace mpillama

#endif
