// The kernels of `elementwise.h` over the vectors of a Simd, which is to be included before.
#pragma once
#include "elementwise.h"
#include "elementwise_math.h"

namespace mpillama {
namespace {

// Calls f(i, load, store) for each vector; the last one may be short, and is then filled up with zeros.
template <class Fn> void each(size_t n, Fn f) {
  constexpr size_t width = Simd::width;
  size_t i = 0;
  for (; i + width <= n; i += width)
    f(i, [](const float* p) { return Simd::load(p); }, [](float* p, F x) { Simd::store(p, x); });
  if (const size_t rest = n - i)
    f(i, [rest](const float* p) { return Simd::load(p, rest); }, [rest](float* p, F x) { Simd::store(p, x, rest); });
}

template <class Fn> void map(const float* x, float* out, size_t n, Fn f) {
  each(n, [&](size_t i, auto load, auto store) { store(out + i, f(load(x + i))); });
}

template <class Fn> void map(const float* a, const float* b, float* out, size_t n, Fn f) {
  each(n, [&](size_t i, auto load, auto store) { store(out + i, f(load(a + i), load(b + i))); });
}

F silu(F x) { return Simd::mul(x, sigmoid(x)); }

// x / 2 (1 + tanh(u)) with u = sqrt(2 / pi) (x + 0.044715 x^3) (arXiv:1606.08415), which is x sigmoid(2 u).
F gelu(F x) {
  const F cubic = Simd::fma(Simd::mul(x, x), Simd::all(0.044715f), Simd::all(1));
  return Simd::mul(x, sigmoid(Simd::mul(Simd::mul(Simd::all(1.5957691216057308f), x), cubic)));
}

// gpt-oss: alpha 1.702, limit 7 (openai/gpt-oss, model card, section on the MoE block).
F swiglu_oai(F gate, F up) {
  const F limit = Simd::all(7), g = Simd::min(limit, gate);
  const F u = Simd::max(Simd::all(-7), Simd::min(limit, up));
  return Simd::mul(Simd::mul(g, sigmoid(Simd::mul(Simd::all(1.702f), g))), Simd::add(u, Simd::all(1)));
}

void op_gated(Activation activation, const float* gate, const float* up, float* out, size_t n) {
  switch (activation) {
    case Activation::silu: map(gate, up, out, n, [](F g, F u) { return Simd::mul(silu(g), u); }); break;
    case Activation::gelu: map(gate, up, out, n, [](F g, F u) { return Simd::mul(gelu(g), u); }); break;
    case Activation::swiglu_oai: map(gate, up, out, n, [](F g, F u) { return swiglu_oai(g, u); }); break;
  }
}

void op_sigmoid(const float* x, float* out, size_t n) {
  map(x, out, n, [](F a) { return sigmoid(a); });
}

void op_softcap(const float* x, float cap, float* out, size_t n) {
  const F c = Simd::all(cap);
  map(x, out, n, [&](F a) { return Simd::mul(c, tanh(Simd::div(a, c))); });
}

void op_add(const float* a, const float* b, float* out, size_t n) {
  map(a, b, out, n, [](F x, F y) { return Simd::add(x, y); });
}

void op_mul(const float* a, const float* b, float* out, size_t n) {
  map(a, b, out, n, [](F x, F y) { return Simd::mul(x, y); });
}

void op_scale(const float* a, float factor, float* out, size_t n) {
  const F f = Simd::all(factor);
  map(a, out, n, [&](F x) { return Simd::mul(x, f); });
}

void op_accumulate(const float* x, float factor, float* out, size_t n) {
  const F f = Simd::all(factor);
  map(x, out, out, n, [&](F a, F sum) { return Simd::fma(f, a, sum); });
}

void op_rms_norm(const float* x, const float* w, float eps, float* out, size_t n) {
  constexpr size_t width = Simd::width;
  // Four sums, because each addition waits for the one before.
  F sums[4] = {Simd::zero(), Simd::zero(), Simd::zero(), Simd::zero()};
  size_t i = 0;
  for (; i + 4 * width <= n; i += 4 * width)
    for (size_t j = 0; j < 4; j++) {
      const F a = Simd::load(x + i + j * width);
      sums[j] = Simd::fma(a, a, sums[j]);
    }
  each(n - i, [&](size_t j, auto load, auto) {
    const F a = load(x + i + j);
    sums[0] = Simd::fma(a, a, sums[0]);
  });
  const float total = Simd::sum(Simd::add(Simd::add(sums[0], sums[1]), Simd::add(sums[2], sums[3])));
  const F factor = Simd::all(1.0f / __builtin_sqrtf(total / float(n) + eps));
  map(x, w, out, n, [&](F a, F b) { return Simd::mul(Simd::mul(a, factor), b); });
}

void op_rope(const float* x, const float* cos, const float* sin, size_t n_rot, bool neox, float* out, size_t n) {
  if (neox) {
    const size_t half = n_rot / 2;
    each(half, [&](size_t i, auto load, auto store) {
      const F a = load(x + i), b = load(x + half + i);
      store(out + i, Simd::fma(a, load(cos + i), Simd::mul(b, load(sin + i))));
      store(out + half + i, Simd::fma(b, load(cos + half + i), Simd::mul(a, load(sin + half + i))));
    });
  } else {
    each(n_rot, [&](size_t i, auto load, auto store) {
      const F a = load(x + i);
      store(out + i, Simd::fma(a, load(cos + i), Simd::mul(Simd::swap_pairs(a), load(sin + i))));
    });
  }
  for (size_t i = n_rot; i < n; i++) out[i] = x[i];
}

size_t op_first_above(const float* x, size_t n, float bar) {
  constexpr size_t width = Simd::width;
  const F bars = Simd::all(bar);
  size_t i = 0;
  while (i + width <= n && Simd::at_most(Simd::load(x + i), bars)) i += width;
  while (i < n && x[i] <= bar) i++;
  return i;
}

constexpr ElementwiseKernels elementwise_kernels{op_gated, op_sigmoid,    op_softcap,  op_add,  op_mul,
                                                 op_scale, op_accumulate, op_rms_norm, op_rope, op_first_above};

}  // namespace
}  // namespace mpillama
