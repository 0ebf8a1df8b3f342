// Activations in 8 bits, as products of quantized weights take them.
#pragma once
#include "compat.cuh"

// Sub-blocks of 32 share a scale, their largest size / 127. Eight lanes work on one, each of which
// has four of its numbers; all lanes must come here, also those that are not `here`.
MPL_INLINE void round_four(const float* v, bool here, i64 unit, int part, int* xq, float* xd, float* xs) {
  float top = 0.f;
#pragma unroll
  for (int i = 0; i < 4; i++) top = fmaxf(top, fabsf(v[i]));
  top = lanes_max<8>(top);
  const float inverse = top > 0.f ? 127.f / top : 0.f, scale = top / 127.f;
  u32 packed = 0;
  int sum = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int q = (int)rintf(v[i] * inverse);
    sum += q;
    packed |= (u32)(q & 255) << 8 * i;
  }
  const float total = lanes_sum<4>((float)sum);
  if (!here) return;
  xq[unit * 8 + part] = (int)packed;
  if (part == 0) xd[unit] = scale;
  if (part % 4 == 0) xs[unit * 2 + part / 4] = scale * total;
}
