// Gated activations, act(gate) * up: 0 silu, 1 gelu (tanh), 2 the clamped swiglu of gpt-oss.
#pragma once
#include "compat.cuh"

// x times the logistic function of k x.
MPL_INLINE float swish(float x, float k) {
  const float e = expf(-fabsf(k * x));
  return x * (k * x >= 0.f ? 1.f : e) / (1.f + e);
}

MPL_INLINE float gate_with(int activation, float gate, float up) {
  if (activation == 0) return swish(gate, 1.f) * up;
  if (activation == 1)
    return 0.5f * gate * (1.f + tanhf(0.7978845608028654f * gate * (1.f + 0.044715f * gate * gate))) * up;
  return swish(fminf(gate, 7.f), 1.702f) * (fminf(fmaxf(up, -7.f), 7.f) + 1.f);
}
