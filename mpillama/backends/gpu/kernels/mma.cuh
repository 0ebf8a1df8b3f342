// Matrix units: products of float16 by a whole warp, with sums in float32.
//
// NVIDIA's are those from sm_80 on, by warps of 32; AMD's those of CDNA from 2 on, by warps of 64. Kernels see by MPL_MMA whether there
// are any.
#pragma once
#include "compat.cuh"

#if defined(MPL_EMULATE)
#define MPL_MMA 1
#elif defined(MPL_HIP)
#if defined(__gfx90a__) || defined(__gfx940__) || defined(__gfx941__) || defined(__gfx942__) || defined(__gfx950__)
#define MPL_MMA 1
#else
#define MPL_MMA 0
#endif
#elif defined(__CUDA_ARCH__)
#define MPL_MMA (__CUDA_ARCH__ >= 800)
#else
#define MPL_MMA 0
#endif

#if MPL_MMA
// Two numbers as float16, the first in the low half.
MPL_INLINE u32 halves(float low, float high) {
#if defined(MPL_EMULATE) || defined(MPL_HIP)
  return float_to_half(low) | (u32)float_to_half(high) << 16;
#else
  u32 both; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low)); return both;
#endif
}
#endif

#if defined(MPL_EMULATE)
// out (16, N) = left (16, 16) right (N, 16)^T.
template <int N> inline void multiply_rows(const float (*left)[16], const float (*right)[16], float* out) {
  for (int i = 0; i < 16 * N; i++) {
    out[i] = 0.f;
    for (int k = 0; k < 16; k++) out[i] += left[i / N][k] * right[i % N][k];
  }
}
#endif

#if MPL_MMA && MPL_WARP == 64
// AMD's v_mfma_f32_16x16x16_f16 ("AMD Instinct MI300 Instruction Set Architecture", "Dense Matrix Multiplication Layouts"): a, b and
// c are 16 x 16. With g = lane % 16 and t = lane / 16 a lane has of a columns 4 t to 4 t + 3 of row g, of b rows 4 t to 4 t + 3 of
// column g, both as two words, and of c rows 4 t to 4 t + 3 of column g. CDNA 2 counts subnormal numbers as zeros; so does the
// emulation.
MPL_INLINE void mma_half(float* c, const u32* a, u32 b0, u32 b1) {
#if defined(MPL_EMULATE)
  struct Words { u32 v[4]; } mine = {{a[0], a[1], b0, b1}};
  auto* slots = emulate::exchange(mine);
  const float* sums = emulate::product(slots, [&](float* out) {
    float left[16][16], right[16][16];
    for (unsigned lane = 0; lane < 64; lane++) {
      Words w;
      memcpy(&w, slots[lane], sizeof w);
      for (unsigned i = 0; i < 4; i++) {
        const u16 both[2] = {(u16)(w.v[i / 2] >> 16 * (i % 2)), (u16)(w.v[2 + i / 2] >> 16 * (i % 2))};
        const unsigned k = lane / 16 * 4 + i;
        left[lane % 16][k] = both[0] & 0x7C00 ? half_to_float(both[0]) : 0.f;
        right[lane % 16][k] = both[1] & 0x7C00 ? half_to_float(both[1]) : 0.f;
      }
    }
    multiply_rows<16>(left, right, out);
  });
  const unsigned at = emulate::lane() / 16 * 64 + emulate::lane() % 16;
  for (unsigned i = 0; i < 4; i++) c[i] += sums[at + 16 * i];
#else
  typedef _Float16 Four __attribute__((ext_vector_type(4)));
  typedef float Sums __attribute__((ext_vector_type(4)));
  union { u32 u[2]; Four h; } left = {{a[0], a[1]}}, right = {{b0, b1}};
  Sums sums = {c[0], c[1], c[2], c[3]};
  sums = __builtin_amdgcn_mfma_f32_16x16x16f16(left.h, right.h, sums, 0, 0, 0);
  c[0] = sums.x, c[1] = sums.y, c[2] = sums.z, c[3] = sums.w;
#endif
}
#endif

#if MPL_MMA && MPL_WARP == 32
// NVIDIA's mma.m16n8k16 (PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point types"): a is 16 x 16, b is 16 x 8,
// c is 16 x 8. With g = lane / 4 and t = lane % 4 a lane has of a word t of row g and of row g + 8, then word t + 4 of both; of b
// words t and t + 4 of column g; and of c columns 2 t and 2 t + 1 in row g, then in row g + 8. A word has two neighbours, the first
// in its low half. `first`: c is set to the product, not added to.
MPL_INLINE void mma_half(float* c, const u32* a, u32 b0, u32 b1, bool first) {
#if defined(MPL_EMULATE)
  struct Words { u32 a[4], b[2]; } mine = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  auto* slots = emulate::exchange(mine);
  const float* sums = emulate::product(slots, [&](float* out) {
    float left[16][16], right[8][16];
    for (unsigned lane = 0; lane < 32; lane++) {
      Words w;
      memcpy(&w, slots[lane], sizeof w);
      for (unsigned i = 0; i < 2; i++)
        for (unsigned j = 0; j < 2; j++)
          for (unsigned part = 0; part < 2; part++) {
            const unsigned k = 8 * j + 2 * (lane % 4) + part;
            left[lane / 4 + 8 * i][k] = half_to_float((u16)(w.a[i + 2 * j] >> 16 * part));
            right[lane / 4][k] = half_to_float((u16)(w.b[j] >> 16 * part));
          }
    }
    multiply_rows<8>(left, right, out);
  });
  const unsigned at = emulate::lane() / 4 * 8 + emulate::lane() % 4 * 2;
  for (unsigned i = 0; i < 4; i++) c[i] = (first ? 0.f : c[i]) + sums[at + i / 2 * 64 + i % 2];
#else
  if (first)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%10,%10,%10};"
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(0.f));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// Four matrices of 8 rows of 16 bytes, 8 x 8 halves; lane i says where row i % 8 of matrix i / 8 is, and gets of each matrix word
// t of row g or, transposed, the halves 2 t and 2 t + 1 of column g.
template <bool TRANSPOSED> MPL_INLINE void load_matrices(u32* out, SharedAt row) {
#if defined(MPL_EMULATE)
  const unsigned lane = emulate::lane(), g = lane / 4, t = lane % 4;
  const auto* slots = emulate::exchange(row);
  for (unsigned i = 0; i < 4; i++) {
    u16 both[2];
    for (unsigned j = 0; j < 2; j++) {
      const u8* from;
      memcpy(&from, slots[8 * i + (TRANSPOSED ? 2 * t + j : g)], sizeof from);
      memcpy(&both[j], from + 2 * (TRANSPOSED ? g : 2 * t + j), 2);
    }
    out[i] = both[0] | (u32)both[1] << 16;
  }
#else
  if (TRANSPOSED)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(row) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3]) : "r"(row) : "memory");
#endif
}

// Whether it is true in any lane of the warp.
MPL_INLINE bool any_lane(bool here) {
#if defined(MPL_EMULATE)
  bool found = false, one;
  const auto* slots = emulate::exchange(here);
  for (unsigned i = 0; i < 32; i++) memcpy(&one, slots[i], sizeof one), found |= one;
  return found;
#else
  return __any_sync(0xffffffffu, here);
#endif
}

MPL_INLINE void store_16(SharedAt to, Piece v) {
#if defined(MPL_EMULATE)
  memcpy(to, &v, 16);
#else
  asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" : : "r"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
#endif
}
#endif
