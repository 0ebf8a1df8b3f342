// The largest logits of each row; see Backend.top_k of base.py.
#pragma once
#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace mpillama {

// x (n_rows, n) to out (n_rows, 2, k): values and columns, which are counted from `first`.
void top_k(Pool& pool, const float* x, size_t n_rows, size_t n, size_t k, uint32_t first, float* out);

// The same from x (n_rows, n_parts, 2, k).
void merge_top_k(Pool& pool, const float* x, size_t n_rows, size_t n_parts, size_t k, float* out);

}  // namespace mpillama
