#include "elementwise_ops.h"

#include <algorithm>
#include <cmath>

namespace mpillama {

const ElementwiseKernels& elementwise_kernels_of(Level level) {
#if MPILLAMA_X86
  if (level >= Level::avx512) return avx512_elementwise;
  if (level == Level::avx2) return avx2_elementwise;
#elif MPILLAMA_ARM
#if MPILLAMA_SVE512
  if (level == Level::sve512) return sve512_elementwise;
#endif
  if (level >= Level::neon) return neon_elementwise;
#endif
  (void)level;
  return scalar_elementwise;
}

namespace {

// Elements that are worth a thread's while: a few microseconds.
constexpr size_t cheap = 16384, costly = 4096;

const ElementwiseKernels& kernels_of(const Pool& pool) { return elementwise_kernels_of(pool.level()); }

size_t rows_worth(size_t elements, size_t width) { return std::max<size_t>(1, elements / std::max<size_t>(1, width)); }

// Ranks the experts of one token by their logits, and weighs them.
void route_token(const Routing& r, size_t token) {
  const float* logits = r.logits + token * r.n_expert;
  int64_t* experts = r.experts + token * r.n_used;
  float* weights = r.weights + token * r.n_used;
  for (size_t k = 0; k < r.n_used; k++) {
    int64_t best = -1;
    for (size_t e = 0; e < r.n_expert; e++) {
      const bool taken = std::find(experts, experts + k, int64_t(e)) != experts + k;
      if (!taken && (best < 0 || logits[e] > logits[best])) best = int64_t(e);
    }
    experts[k] = best;
  }
  const float top = logits[experts[0]];
  float total = 0;
  for (size_t k = 0; k < r.n_used; k++) {
    weights[k] = std::exp(logits[experts[k]] - top);
    total += weights[k];
  }
  if (r.softmax_of_all) {
    total = 0;
    for (size_t e = 0; e < r.n_expert; e++) total += std::exp(logits[e] - top);
  }
  float sum = 0;
  for (size_t k = 0; k < r.n_used; k++) sum += weights[k] /= total;
  // The smallest normal number of float16 keeps the division sound.
  if (r.normalize)
    for (size_t k = 0; k < r.n_used; k++) weights[k] /= std::max(sum, 6.103515625e-5f);
}

}  // namespace

void gated(Pool& pool, Activation activation, const float* gate, const float* up, float* out, size_t n) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(n, costly, [&](size_t i, size_t end) {
    kernels.gated(activation, gate + i, up + i, out + i, end - i);
  });
}

void sigmoid(Pool& pool, const float* x, float* out, size_t n) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(n, costly, [&](size_t i, size_t end) { kernels.sigmoid(x + i, out + i, end - i); });
}

void softcap(Pool& pool, const float* x, float cap, float* out, size_t n) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(n, costly, [&](size_t i, size_t end) { kernels.softcap(x + i, cap, out + i, end - i); });
}

void binary(Pool& pool, Binary op, const float* a, const float* b, float* out, size_t n, size_t n_b) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  const auto apply = op == Binary::add ? kernels.add : kernels.mul;
  if (n == n_b) {
    pool.parallel_for(n, cheap, [&](size_t i, size_t end) { apply(a + i, b + i, out + i, end - i); });
    return;
  }
  pool.parallel_for(n / std::max<size_t>(1, n_b), rows_worth(cheap, n_b), [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; row++) apply(a + row * n_b, b, out + row * n_b, n_b);
  });
}

void scale(Pool& pool, const float* a, float factor, float* out, size_t n) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(n, cheap, [&](size_t i, size_t end) { kernels.scale(a + i, factor, out + i, end - i); });
}

void rms_norm(Pool& pool, const float* x, const float* w, float eps, float* out, size_t n_rows, size_t n) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(n_rows, rows_worth(cheap, n), [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; row++) kernels.rms_norm(x + row * n, w, eps, out + row * n, n);
  });
}

void rope(Pool& pool, const Rotation& r) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(r.n_tokens, rows_worth(cheap, r.n_heads * r.n), [&](size_t begin, size_t end) {
    for (size_t token = begin; token < end; token++) {
      const float *cos = r.cos + token * r.n_rot, *sin = r.sin + token * r.n_rot;
      for (size_t i = token * r.n_heads * r.n; i < (token + 1) * r.n_heads * r.n; i += r.n)
        kernels.rope(r.x + i, cos, sin, r.n_rot, r.neox, r.out + i, r.n);
    }
  });
}

void rope_table(Pool& pool, const RopeTable& t) {
  const auto turn = pool.lock();
  const size_t step = t.neox ? 1 : 2, other = t.neox ? t.n_pairs : 1;
  pool.parallel_for(t.n_tokens, rows_worth(costly / 8, t.n_pairs), [&](size_t begin, size_t end) {
    for (size_t token = begin; token < end; token++) {
      float *cos = t.cos + token * 2 * t.n_pairs, *sin = t.sin + token * 2 * t.n_pairs;
      for (size_t pair = 0; pair < t.n_pairs; pair++) {
        const double angle = t.positions[token] * t.theta[pair];
        const size_t i = pair * step;
        cos[i] = cos[i + other] = float(std::cos(angle) * t.factor);
        sin[i + other] = float(std::sin(angle) * t.factor);
        sin[i] = -sin[i + other];
      }
    }
  });
}

void sum_experts(Pool& pool, const float* x, const float* weights, float* out, size_t n_tokens, size_t n_used, size_t n) {
  const auto turn = pool.lock();
  const ElementwiseKernels& kernels = kernels_of(pool);
  pool.parallel_for(n_tokens, rows_worth(cheap, n_used * n), [&](size_t begin, size_t end) {
    std::fill(out + begin * n, out + end * n, 0.0f);
    for (size_t i = begin * n_used; i < end * n_used; i++) kernels.accumulate(x + i * n, weights[i], out + i / n_used * n, n);
  });
}

void route(Pool& pool, const Routing& r) {
  const auto turn = pool.lock();
  pool.parallel_for(r.n_tokens, rows_worth(costly, r.n_expert * r.n_used), [&](size_t begin, size_t end) {
    for (size_t token = begin; token < end; token++) route_token(r, token);
  });
}

}  // namespace mpillama
