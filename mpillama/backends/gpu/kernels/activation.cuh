// Gated activations.
#pragma once
#include "compat.cuh"

MPL_INLINE float logistic(float x) {
  const float e = expf(-fabsf(x));
  return (x >= 0.f ? 1.f : e) / (1.f + e);
}

// act(gate) * up; activation 0: silu, 1: gelu (tanh), 2: the clamped swiglu of gpt-oss.
MPL_INLINE float gate_with(int activation, float gate, float up) {
  if (activation == 0) return gate * logistic(gate) * up;
  if (activation == 1)
    return 0.5f * gate * (1.f + tanhf(0.7978845608028654f * gate * (1.f + 0.044715f * gate * gate))) * up;
  gate = fminf(gate, 7.f);
  return gate * logistic(1.702f * gate) * (fminf(fmaxf(up, -7.f), 7.f) + 1.f);
}
