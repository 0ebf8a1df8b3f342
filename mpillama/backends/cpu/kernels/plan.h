// Which rows of x meet which matrix, and how they are prepared for the kernels.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "matmul.h"

namespace mpillama {

// Places [first, first + count) of the order below meet matrix `mat`.
struct Segment {
  size_t mat, first, count;
};

// The i-th place is row x_rows[i] of x and row y_rows[i] of y.
struct Plan {
  std::vector<Segment> segments;
  std::vector<size_t> x_rows, y_rows;
};

// Calls f(values, group, n_groups) for pieces of a row of x that cover n_groups groups of 32 columns, zeros filled in.
template <class F>
void for_groups(const Input& x, size_t row, size_t n_groups, F&& f) {
  const float* values = x.data + row * x.width;
  if (x.pad == 0 && x.width == 32 * n_groups) {
    f(values, size_t(0), n_groups);
    return;
  }
  constexpr size_t step = 8;
  float piece[32 * step];
  for (size_t g = 0; g < n_groups; g += step) {
    const size_t begin = 32 * g, n = std::min(step, n_groups - g), end = begin + 32 * n;
    const size_t from = std::clamp(x.pad, begin, end), to = std::clamp(x.pad + x.width, begin, end);
    std::memset(piece, 0, sizeof piece);
    if (from < to) std::memcpy(piece + (from - begin), values + (from - x.pad), (to - from) * sizeof(float));
    f(piece, g, n);
  }
}

#if MPILLAMA_AMX
// Whether AMX is the faster way for so many tokens of one matrix.
bool wants_tiles(const Pool& pool, const PackedWeight& w, size_t n_tokens);

// The segments of a plan for which `wants_tiles`.
void multiply_tiles(Pool& pool, const PackedWeight& w, const Input& x, const Plan& plan,
                    const std::vector<Segment>& segments, float* y);
#endif

}  // namespace mpillama
