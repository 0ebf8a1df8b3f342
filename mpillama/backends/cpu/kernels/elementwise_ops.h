// The small ops on a pool of threads; see base.py for what they compute. Arrays are contiguous float32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "elementwise.h"
#include "pool.h"

namespace mpillama {

void gated(Pool& pool, Activation activation, const float* gate, const float* up, float* out, size_t n);
void sigmoid(Pool& pool, const float* x, float* out, size_t n);
void softcap(Pool& pool, const float* x, float cap, float* out, size_t n);

enum class Binary { add, mul };

// The n_b elements of b are used again and again; n is a multiple of n_b.
void binary(Pool& pool, Binary op, const float* a, const float* b, float* out, size_t n, size_t n_b);
void scale(Pool& pool, const float* a, float factor, float* out, size_t n);

void rms_norm(Pool& pool, const float* x, const float* w, float eps, float* out, size_t n_rows, size_t n);

// x [n_tokens][n_heads][n]; cos and sin [n_tokens][n_rot], as in ElementwiseKernels.
struct Rotation {
  const float *x, *cos, *sin;
  float* out;
  size_t n_tokens, n_heads, n, n_rot;
  bool neox;
};
void rope(Pool& pool, const Rotation& r);

// positions [n_tokens], theta [n_pairs]; cos and sin [n_tokens][2 n_pairs] get the cosine and the signed sine of each
// product, times the factor, for both elements of a pair: (i, i + n_pairs) if neox, else (2 i, 2 i + 1).
struct RopeTable {
  const int32_t* positions;
  size_t n_tokens;
  const double* theta;
  size_t n_pairs;
  double factor;
  bool neox;
  float *cos, *sin;
};
void rope_table(Pool& pool, const RopeTable& t);

// x [n_tokens][n_used][n], weights [n_tokens][n_used], out [n_tokens][n].
void sum_experts(Pool& pool, const float* x, const float* weights, float* out, size_t n_tokens, size_t n_used, size_t n);

// logits [n_tokens][n_expert], experts and weights [n_tokens][n_used]; among equals the first is chosen. The weights are
// a softmax over all experts, or over those that were chosen; then, if wanted, they are divided by their sum.
struct Routing {
  const float* logits;
  int64_t* experts;
  float* weights;
  size_t n_tokens, n_expert, n_used;
  bool softmax_of_all, normalize;
};
void route(Pool& pool, const Routing& r);

}  // namespace mpillama
