// Every block format as sub-blocks of 32 weights: w[i] = scale[i / 16] * q[i] - min[i / 16], q a signed byte.
//
// Blocks are those of the file (ggml-common.h); quants.py is the plain statement of each. Offsets of unsigned codes go into
// the minimum, which costs a product a sub-block instead of a subtraction a weight. grids.cuh is made from quant_grids.py.
#pragma once
#include "compat.cuh"
#include "grids.cuh"

// Numbers of enum ggml_type.
#define T_F32 0
#define T_F16 1
#define T_Q4_0 2
#define T_Q4_1 3
#define T_Q5_0 6
#define T_Q5_1 7
#define T_Q8_0 8
#define T_Q2_K 10
#define T_Q3_K 11
#define T_Q4_K 12
#define T_Q5_K 13
#define T_Q6_K 14
#define T_IQ2_XXS 16
#define T_IQ2_XS 17
#define T_IQ3_XXS 18
#define T_IQ1_S 19
#define T_IQ4_NL 20
#define T_IQ3_S 21
#define T_IQ2_S 22
#define T_IQ4_XS 23
#define T_IQ1_M 29
#define T_BF16 30
#define T_TQ1_0 34
#define T_TQ2_0 35
#define T_MXFP4 39
#define T_NVFP4 40
#define T_Q1_0 41
#define T_Q2_0 42

#define MPL_FLOAT (MPL_TYPE == T_F32 || MPL_TYPE == T_F16 || MPL_TYPE == T_BF16)

struct Sub {
  int q[8];  // four weights each
  float scale[2], min[2];
};

// Part of a row in shared memory: byte `at` of `base`, which is a multiple of 16. Words of which only some bytes belong to it
// may be read as a whole, and the word behind its last.
struct Staged {
  const u8* base;
  int at;
  __device__ __forceinline__ Staged operator+(i64 n) const { return {base, at + (int)n}; }
  __device__ __forceinline__ u8 operator[](int i) const { return base[at + i]; }
};

// `decode` reads a row where it lies, byte by byte if need be, or what is `Staged`, in whole words.
//
// Little-endian words of blocks that lie on multiples of A bytes.
template <int A> MPL_INLINE u32 word(const u8* p) {
  if (A >= 4) return *(const u32*)p;
  if (A == 2) return ((const u16*)p)[0] | (u32)((const u16*)p)[1] << 16;
  return p[0] | (u32)p[1] << 8 | (u32)p[2] << 16 | (u32)p[3] << 24;
}

// N words in a row, each shifted right by `bits` (below 8): the top ones are then undefined.
template <int A, int N> MPL_INLINE void words(const u8* p, u32* v, int bits = 0) {
#pragma unroll
  for (int i = 0; i < N; i++) {
    if (A < 16) v[i] = word<A>(p + 4 * i) >> bits;
    else if (i % 4 == 0) {
      const Piece q = *(const Piece*)(p + 4 * i);
      v[i] = q.x >> bits, v[i + 1] = q.y >> bits, v[i + 2] = q.z >> bits, v[i + 3] = q.w >> bits;
    }
  }
}
template <int A, int N> MPL_INLINE void words(Staged p, u32* v, int bits = 0) {
  if (A >= 4) {
    words<A, N>(p.base + p.at, v, bits);
  } else {
    // Of N + 1 words, each two neighbours have one of those that are wanted.
    const u32* at = (const u32*)p.base + (p.at >> 2);
    const int shift = (p.at & 3) * 8 + bits;
    u32 low = at[0];
#pragma unroll
    for (int i = 0; i < N; i++) {
      const u32 high = at[i + 1];
      v[i] = shift_pair(low, high, shift);
      low = high;
    }
  }
}
template <int A> MPL_INLINE u32 word(Staged p) {
  u32 v;
  words<A, 1>(p, &v);
  return v;
}
MPL_INLINE u32 short_at(const u8* p) { return *(const u16*)p; }
MPL_INLINE u32 short_at(Staged p) { return *(const u16*)(p.base + p.at); }
template <class P> MPL_INLINE float half_at(P p) { return half_to_float((u16)short_at(p)); }

MPL_INLINE void uniform(Sub& s, float scale, float min) {
  s.scale[0] = s.scale[1] = scale;
  s.min[0] = s.min[1] = min;
}
// 16 bytes: 16 low halves, then 16 high ones.
template <int A, class P> MPL_INLINE void nibbles(Sub& s, P p) {
  u32 v[4];
  words<A, 4>(p, v);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    s.q[i] = v[i] & 0x0F0F0F0F;
    s.q[i + 4] = v[i] >> 4 & 0x0F0F0F0F;
  }
}
// Bits 0 to 3, each in a byte.
MPL_INLINE u32 spread(u32 nibble) { return nibble * 0x00204081u & 0x01010101u; }
// Bytes that are not zero, negated where bits 0 to 3 say so.
MPL_INLINE int negate(u32 q, u32 nibble) {
  const u32 ones = spread(nibble);
  return (int)((q ^ ones * 255u) + ones);
}
// The eighth sign makes their number even.
MPL_INLINE u32 even_signs(u32 seven) {
  u32 parity = seven ^ seven >> 4;
  parity ^= parity >> 2;
  return seven | ((parity ^ parity >> 1) & 1) << 7;
}
// Entries 0 to 15 of a table of signed bytes.
MPL_INLINE int look_up(u32 v, u32 t0, u32 t1, u32 t2, u32 t3) {
  const u32 upper = (v >> 3 & 0x01010101u) * 255u;
  v &= 0x07070707u;
  return (int)((pick_of_8(t0, t1, v) & ~upper) | (pick_of_8(t2, t3, v) & upper));
}
MPL_INLINE int iq4_values(u32 v) { return look_up(v, 0xBFAD9881u, 0xF6EADDCFu, 0x26190D01u, 0x71594535u); }
MPL_INLINE int fp4_values(u32 v) { return look_up(v, 0x03020100u, 0x0C080604u, 0xFDFEFF00u, 0xF4F8FAFCu); }
