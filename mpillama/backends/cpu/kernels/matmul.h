// Products of activations with packed weights.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "elementwise.h"
#include "packed.h"
#include "pool.h"

namespace mpillama {

// x: rows of `width` floats, which meet the columns [pad, pad + width) of the matrix; other columns meet zeros.
struct Input {
  const float* data;
  size_t n_rows, width, pad;
};

// y (n_rows of x, n_rows of w) = x W^T with matrix 0.
void linear(Pool& pool, const PackedWeight& w, const Input& x, float* y);

// The same for several matrices, each with its y.
struct Product {
  const PackedWeight* w;
  float* y;
};
void linears(Pool& pool, const std::vector<Product>& products, const Input& x);

// y = act(x G^T) * (x U^T) for matrices of the same shape.
void gated_linear(Pool& pool, Activation activation, const PackedWeight& gate, const PackedWeight& up, const Input& x,
                  float* y);

// y (n_tokens, n_used, n_rows of w): row (t, k) is matrix experts[t][k] times row t of x, or row t * n_used + k where x has
// that many rows.
void expert_linear(Pool& pool, const PackedWeight& w, const Input& x, size_t n_tokens, size_t n_used,
                   const int64_t* experts, float* y);

// Rows tokens - first of matrix 0; zeros where there is no such row.
void embedding(Pool& pool, const PackedWeight& w, const int32_t* tokens, int64_t first, size_t n, float* y);

}  // namespace mpillama
