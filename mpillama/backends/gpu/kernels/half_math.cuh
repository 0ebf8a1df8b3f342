// Arithmetic on pairs of float16 in a word, the first in the low half.
#pragma once
#include "mma.cuh"

#if MPL_MMA
#if MPL_WARP == 32
MPL_INLINE float clamped(float x) { return x > 65504.f ? 65504.f : x < -65504.f ? -65504.f : x; }

// Both halves times a number; what float16 has no room for becomes its largest number.
MPL_INLINE u32 times(u32 pair, u16 factor) {
#if defined(MPL_EMULATE)
  const float f = half_to_float(factor);
  return halves(clamped(half_to_float((u16)pair) * f), clamped(half_to_float((u16)(pair >> 16)) * f));
#else
  u32 y;
  asm("{.reg .b32 f; mov.b32 f, {%2, %2}; mul.rn.f16x2 f, %1, f; min.NaN.f16x2 f, f, %3; max.NaN.f16x2 %0, f, %4;}"
      : "=r"(y) : "r"(pair), "h"(factor), "r"(0x7BFF7BFFu), "r"(0xFBFFFBFFu));
  return y;
#endif
}
#endif

#if defined(MPL_HIP)
typedef _Float16 Half2 __attribute__((ext_vector_type(2)));
MPL_INLINE Half2 pair_of(u32 word) { return __builtin_bit_cast(Half2, word); }
#endif

// x y + z, rounded once.
MPL_INLINE u32 fused(u32 x, u32 y, u32 z) {
#if defined(MPL_EMULATE)
  const auto one = [&](int shift) {
    return fmaf(half_to_float((u16)(x >> shift)), half_to_float((u16)(y >> shift)), half_to_float((u16)(z >> shift)));
  };
  return halves(one(0), one(16));
#elif defined(MPL_HIP)
  // Not as asm: how long `mma_half` must wait for a result the compiler only knows of its own instructions.
  const Half2 a = pair_of(x), b = pair_of(y);
  Half2 c = pair_of(z);
  c.x = __builtin_fmaf16(a.x, b.x, c.x), c.y = __builtin_fmaf16(a.y, b.y, c.y);
  return __builtin_bit_cast(u32, c);
#else
  u32 v; asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(x), "r"(y), "r"(z)); return v;
#endif
}

// Bytes 2 I and 2 I + 1 of a word, unsigned, less an offset, of which both halves are 1024 and more: 1024 + n is 0x6400 + n.
template <int I> MPL_INLINE u32 bytes_less(u32 bytes, u32 offset) {
#if defined(MPL_EMULATE)
  const float minus = half_to_float((u16)offset) - 1024.f;
  return halves((float)(bytes >> 16 * I & 255) - minus, (float)(bytes >> (16 * I + 8) & 255) - minus);
#elif defined(MPL_HIP)
  return __builtin_bit_cast(u32, pair_of(__builtin_amdgcn_perm(0x64646464u, bytes, I ? 0x04030402u : 0x04010400u)) - pair_of(offset));
#else
  u32 y; asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(y) : "r"(__byte_perm(bytes, 0x64646464u, I ? 0x4342 : 0x4140)), "r"(offset)); return y;
#endif
}
// Of bytes with a sign, 128 of which were added to each (x ^ 0x80).
constexpr u32 kSigned = 0x64806480u;
#endif
