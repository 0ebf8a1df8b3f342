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

// Calls f(values, group, n_groups) for pieces of a row of x that cover the groups [first, last) of 32 columns, of n_groups, zeros
// filled in.
template <class F>
void for_groups(const Input& x, size_t row, size_t n_groups, size_t first, size_t last, F&& f) {
  const float* values = x.data + row * x.width;
  if (x.pad == 0 && x.width == 32 * n_groups) {
    f(values + 32 * first, first, last - first);
    return;
  }
  constexpr size_t step = 8;
  float piece[32 * step];
  for (size_t g = first; g < last; g += step) {
    const size_t begin = 32 * g, n = std::min(step, last - g), end = begin + 32 * n;
    const size_t from = std::clamp(x.pad, begin, end), to = std::clamp(x.pad + x.width, begin, end);
    std::memset(piece, 0, sizeof piece);
    if (from < to) std::memcpy(piece + (from - begin), values + (from - x.pad), (to - from) * sizeof(float));
    f(piece, g, n);
  }
}

}  // namespace mpillama
