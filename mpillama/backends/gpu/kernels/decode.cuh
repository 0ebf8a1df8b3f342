// Of the one type MPL_TYPE: how many weights and bytes a block has, whether its halves of 32 differ in scale, whether there
// is a minimum, and `decode` of sub-block `sub` of a row.
#pragma once
#include "codec.cuh"

// What a block of threads works on, of tiles of up to `size` tokens. `tiles` (n, 3): expert (negative: none, all answers are zero),
// first, count (0: nothing to do); without them, tile y is the `size` tokens from size y on, of the only matrix.
struct Tile {
  int expert, first, n;
};
MPL_INLINE Tile tile_of(const int* tiles, int size, int n_tokens) {
  const int y = blockIdx.y;
  if (tiles) return {tiles[3 * y], tiles[3 * y + 1], tiles[3 * y + 2]};
  return {0, y * size, min(size, n_tokens - y * size)};
}

#define FORMAT(block, bytes, halves, min) \
  constexpr int kBlock = block, kBytes = bytes; \
  constexpr bool kHalves = halves, kMin = min;
#ifdef MPL_EMULATE
// One copy for all kernels, for the sake of the compiler's time.
#define DECODE template <class P> static __attribute__((noinline)) void decode(P row, int sub, Sub& s)
#else
#define DECODE template <class P> static __device__ __forceinline__ void decode(P row, int sub, Sub& s)
#endif
// The block of a sub-block, and the sub-block's number in it.
#define BLOCK_OF_32 const P b = row + (i64)sub * kBytes
#define BLOCK_OF(n) const P b = row + (i64)(sub / (n)) * kBytes; const int k = sub % (n)

#if MPL_TYPE == T_Q4_0
FORMAT(32, 18, false, true)
DECODE {
  BLOCK_OF_32;
  const float d = half_at(b);
  nibbles<2>(s, b + 2);
  uniform(s, d, 8.f * d);
}

#elif MPL_TYPE == T_Q4_1
FORMAT(32, 20, false, true)
DECODE {
  BLOCK_OF_32;
  nibbles<4>(s, b + 4);
  uniform(s, half_at(b), -half_at(b + 2));
}

#elif MPL_TYPE == T_Q5_0 || MPL_TYPE == T_Q5_1
#if MPL_TYPE == T_Q5_0
FORMAT(32, 22, false, true)
#else
FORMAT(32, 24, false, true)
#endif
DECODE {
  BLOCK_OF_32;
  constexpr int at = kBytes - 20, A = kBytes % 4 ? 2 : 4;
  const u32 high = word<A>(b + at);
  nibbles<A>(s, b + at + 4);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] |= spread(high >> 4 * i & 15) << 4;
  const float d = half_at(b);
  uniform(s, d, at == 2 ? 16.f * d : -half_at(b + 2));
}

#elif MPL_TYPE == T_Q8_0
FORMAT(32, 34, false, false)
DECODE {
  BLOCK_OF_32;
  words<2, 8>(b + 2, (u32*)s.q);
  uniform(s, half_at(b), 0.f);
}

#elif MPL_TYPE == T_Q2_K
FORMAT(256, 84, true, true)
DECODE {
  BLOCK_OF(8);
  const float d = half_at(b + 80), dmin = half_at(b + 82);
  u32 v[8];
  words<4, 8>(b + 16 + k / 4 * 32, v, 2 * (k % 4));
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = v[i] & 0x03030303;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    s.scale[h] = d * (float)(b[2 * k + h] & 15);
    s.min[h] = dmin * (float)(b[2 * k + h] >> 4);
  }
}

#elif MPL_TYPE == T_Q3_K
FORMAT(256, 110, true, true)
DECODE {
  BLOCK_OF(8);
  const float d = half_at(b + 108);
  u32 low[8], high[8];
  words<2, 8>(b + 32 + k / 4 * 32, low, 2 * (k % 4));
  words<2, 8>(b, high, k);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = (low[i] & 0x03030303) | (high[i] & 0x01010101) << 2;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int n = 2 * k + h;
    const int part = n < 8 ? b[96 + n] & 15 : b[88 + n] >> 4;
    s.scale[h] = d * (float)((part | (b[104 + n % 4] >> 2 * (n / 4) & 3) << 4) - 32);
    s.min[h] = 4.f * s.scale[h];
  }
}

#elif MPL_TYPE == T_Q4_K || MPL_TYPE == T_Q5_K
#if MPL_TYPE == T_Q4_K
FORMAT(256, 144, false, true)
#else
FORMAT(256, 176, false, true)
#endif
DECODE {
  BLOCK_OF(8);
  u32 v[8], f[4];
  words<16, 8>(b + (kBytes - 128 + k / 2 * 32), v, 4 * (k % 2));
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = v[i] & 0x0F0F0F0F;
#if MPL_TYPE == T_Q5_K
  words<16, 8>(b + 16, v, k);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] |= (v[i] & 0x01010101) << 4;
#endif
  // Two factors, then bytes: 4 scales and 4 minima of 6 bits, below the top bits of the other ones; their low bits.
  words<16, 4>(b, f);
  const int shift = 8 * (k % 4);
  const u32 a = f[1] >> shift, c = f[2] >> shift, low = f[3] >> shift;
  const u32 scale = k < 4 ? a & 63 : (low & 15) | (a >> 2 & 48), min = k < 4 ? c & 63 : (low >> 4 & 15) | (c >> 2 & 48);
  uniform(s, half_to_float((u16)f[0]) * (float)(int)scale, half_to_float((u16)(f[0] >> 16)) * (float)(int)min);
}

#elif MPL_TYPE == T_Q6_K
FORMAT(256, 210, true, true)
DECODE {
  BLOCK_OF(8);
  const float d = half_at(b + 208);
  u32 low[8], high[8];
  words<2, 8>(b + k / 4 * 64 + k % 2 * 32, low, k % 4 / 2 * 4);
  words<2, 8>(b + 128 + k / 4 * 32, high, 2 * (k % 4));
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = (low[i] & 0x0F0F0F0F) | (high[i] & 0x03030303) << 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    s.scale[h] = d * (float)(i8)b[192 + 2 * k + h];
    s.min[h] = 32.f * s.scale[h];
  }
}

#elif MPL_TYPE == T_IQ4_NL
FORMAT(32, 18, false, false)
DECODE {
  BLOCK_OF_32;
  nibbles<2>(s, b + 2);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = iq4_values(s.q[i]);
  uniform(s, half_at(b), 0.f);
}

#elif MPL_TYPE == T_IQ4_XS
FORMAT(256, 136, false, false)
DECODE {
  BLOCK_OF(8);
  nibbles<4>(s, b + 8 + 16 * k);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = iq4_values(s.q[i]);
  const int scale = (b[4 + k / 2] >> 4 * (k % 2) & 15) | (short_at(b + 2) >> 2 * k & 3) << 4;
  uniform(s, half_at(b) * (float)(scale - 32), 0.f);
}

#elif MPL_TYPE == T_MXFP4
FORMAT(32, 17, false, false)
DECODE {
  BLOCK_OF_32;
  nibbles<1>(s, b + 1);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = fp4_values(s.q[i]);
  const u32 e = b[0];
  uniform(s, as_float(e < 2 ? 0x00200000u << e : (e - 1) << 23), 0.f);
}

#elif MPL_TYPE == T_NVFP4
FORMAT(64, 36, true, false)
DECODE {
  BLOCK_OF(2);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const u32 e = b[2 * k + h];
    const float fraction = (float)(e % 8 + ((e & 127) > 7 ? 8 : 0));
    const u32 power = (e & 127) > 15 ? (e & 127) / 8 : 1;
    s.scale[h] = e == 127 ? 0.f : fraction * as_float((power + 116) << 23);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 v = word<4>(b + 4 + 16 * k + 8 * h + 4 * i);
      s.q[4 * h + i] = fp4_values(v & 0x0F0F0F0F);
      s.q[4 * h + i + 2] = fp4_values(v >> 4 & 0x0F0F0F0F);
    }
    s.min[h] = 0.f;
  }
}

#elif MPL_TYPE == T_Q1_0
FORMAT(128, 18, false, true)
DECODE {
  BLOCK_OF(4);
  const u32 bits = word<2>(b + 2 + 4 * k);
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = spread(bits >> 4 * i & 15);
  const float d = half_at(b);
  uniform(s, 2.f * d, d);
}

#elif MPL_TYPE == T_Q2_0
FORMAT(64, 18, false, true)
DECODE {
  BLOCK_OF(2);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 v = b[2 + 8 * k + i];
    s.q[i] = (v | v << 6 | v << 12 | v << 18) & 0x03030303;
  }
  const float d = half_at(b);
  uniform(s, d, d);
}

#elif MPL_TYPE == T_TQ1_0
FORMAT(256, 54, false, true)
// One digit to base 3 of each of four bytes, two at a time: the top one of what `power` leaves of a fraction of 256.
MPL_INLINE int digits(u32 v, u32 power) {
  const u32 even = (v & 0x00FF00FFu) * power & 0x00FF00FFu, odd = (v >> 8 & 0x00FF00FFu) * power & 0x00FF00FFu;
  return (int)((even * 3 >> 8 & 0x00FF00FFu) | (odd * 3 & 0xFF00FF00u));
}
MPL_INLINE u32 power_of_3(int n) { return n == 4 ? 81u : 0x1B090301u >> 8 * n & 255; }
// Five runs of 32 digits, from 32 bytes; then five of 16, from 16 bytes, and four of 4, from 4 bytes.
DECODE {
  BLOCK_OF(8);
  const int run = 2 * (k - 5);
  const u32 low = power_of_3(k < 5 ? k : run), high = power_of_3(k < 5 ? k : min(run + 1, 4));
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const bool last = k == 7 && i >= 4;
    const u32 v = word<2>(b + (k < 5 ? 4 * i : last ? 48 : 32 + 4 * (i % 4)));
    s.q[i] = digits(v, last ? power_of_3(i % 4) : i < 4 ? low : high);
  }
  const float d = half_at(b + 52);
  uniform(s, d, d);
}

#elif MPL_TYPE == T_TQ2_0
FORMAT(256, 66, false, true)
DECODE {
  BLOCK_OF(8);
  u32 v[8];
  words<2, 8>(b + k / 4 * 32, v, 2 * (k % 4));
#pragma unroll
  for (int i = 0; i < 8; i++) s.q[i] = v[i] & 0x03030303;
  const float d = half_at(b + 64);
  uniform(s, d, d);
}

#elif MPL_TYPE == T_IQ2_XXS
FORMAT(256, 66, false, false)
DECODE {
  BLOCK_OF(8);
  const P at = b + 2 + 8 * k;
  const u32 bits = word<2>(at + 4);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u64 size = iq2_xxs[at[i]];
    const u32 signs = even_signs(bits >> 7 * i & 127);
    s.q[2 * i] = negate((u32)size, signs & 15);
    s.q[2 * i + 1] = negate((u32)(size >> 32), signs >> 4);
  }
  uniform(s, half_at(b) * ((float)(2 * (bits >> 28) + 1) * 0.125f), 0.f);
}

#elif MPL_TYPE == T_IQ2_XS || MPL_TYPE == T_IQ2_S
#if MPL_TYPE == T_IQ2_XS
FORMAT(256, 74, true, false)
#else
FORMAT(256, 82, true, false)
#endif
DECODE {
  BLOCK_OF(8);
#pragma unroll
  for (int i = 0; i < 4; i++) {
#if MPL_TYPE == T_IQ2_XS
    const u32 v = short_at(b + 2 + 8 * k + 2 * i), signs = even_signs(v >> 9);
    const u64 size = iq2_xs[v & 511];
#else
    const u32 signs = b[34 + 4 * k + i];
    const u64 size = iq2_s[b[2 + 4 * k + i] | (b[66 + k] >> 2 * i & 3) << 8];
#endif
    s.q[2 * i] = negate((u32)size, signs & 15);
    s.q[2 * i + 1] = negate((u32)(size >> 32), signs >> 4);
  }
  const int scales = b[kBytes - 8 + k];
  s.scale[0] = half_at(b) * ((float)(2 * (scales & 15) + 1) * 0.125f);
  s.scale[1] = half_at(b) * ((float)(2 * (scales >> 4) + 1) * 0.125f);
  s.min[0] = s.min[1] = 0.f;
}

#elif MPL_TYPE == T_IQ3_XXS
FORMAT(256, 98, false, false)
DECODE {
  BLOCK_OF(8);
  const u32 bits = word<2>(b + 66 + 4 * k);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 signs = even_signs(bits >> 7 * (i / 2) & 127);
    s.q[i] = negate(iq3_xxs[b[2 + 8 * k + i]], i % 2 ? signs >> 4 : signs & 15);
  }
  uniform(s, half_at(b) * ((float)(2 * (bits >> 28) + 1) * 0.25f), 0.f);
}

#elif MPL_TYPE == T_IQ3_S
FORMAT(256, 110, false, false)
DECODE {
  BLOCK_OF(8);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 size = iq3_s[b[2 + 8 * k + i] | (b[66 + k] >> i & 1) << 8];
    s.q[i] = negate(size, b[74 + 4 * k + i / 2] >> i % 2 * 4 & 15);
  }
  uniform(s, half_at(b) * (float)(2 * (b[106 + k / 2] >> k % 2 * 4 & 15) + 1), 0.f);
}

#elif MPL_TYPE == T_IQ1_S
FORMAT(256, 50, false, true)
DECODE {
  BLOCK_OF(8);
  const u32 bits = short_at(b + 34 + 2 * k), up = bits >> 15 ? 0u : 0x02020202u;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u64 v = iq1[b[2 + 4 * k + i] | (bits >> 3 * i & 7) << 8];  // from 0 to 16
    s.q[2 * i] = (u32)v + up;
    s.q[2 * i + 1] = (u32)(v >> 32) + up;
  }
  const float scale = half_at(b) * ((float)(2 * (bits >> 12 & 7) + 1) * 0.125f);
  uniform(s, scale, 9.f * scale);
}

#elif MPL_TYPE == T_IQ1_M
FORMAT(256, 56, true, true)
DECODE {
  BLOCK_OF(8);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 high = b[32 + 2 * k + i / 2] >> i % 2 * 4 & 15, up = high >> 3 ? 0u : 0x02020202u;
    const u64 v = iq1[b[4 * k + i] | (high & 7) << 8];
    s.q[2 * i] = (u32)v + up;
    s.q[2 * i + 1] = (u32)(v >> 32) + up;
  }
  u32 factor = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) factor |= short_at(b + 48 + 2 * i) >> 12 << 4 * i;
  const float d = half_to_float((u16)factor);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int n = 2 * k + h;
    s.scale[h] = d * ((float)(2 * (short_at(b + 48 + n / 4 * 2) >> 3 * (n % 4) & 7) + 1) * 0.125f);
    s.min[h] = 9.f * s.scale[h];
  }
}

#elif MPL_TYPE == T_F32
constexpr int kBytes = 4;
MPL_INLINE float weight_at(const u8* row, int i) { return ((const float*)row)[i]; }
MPL_INLINE float weight_of(Piece q, int i) { return as_float(word_of(q, i)); }
#elif MPL_TYPE == T_F16
constexpr int kBytes = 2;
MPL_INLINE float weight_at(const u8* row, int i) { return half_to_float(((const u16*)row)[i]); }
MPL_INLINE float weight_of(Piece q, int i) { return half_to_float((u16)(word_of(q, i / 2) >> 16 * (i % 2))); }
#elif MPL_TYPE == T_BF16
constexpr int kBytes = 2;
MPL_INLINE float weight_at(const u8* row, int i) { return bf16_to_float(((const u16*)row)[i]); }
MPL_INLINE float weight_of(Piece q, int i) { return bf16_to_float((u16)(word_of(q, i / 2) >> 16 * (i % 2))); }
#else
#error "a type without a decoder"
#endif
