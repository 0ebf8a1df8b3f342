// Vectors for `kernels_impl.h` with NEON: 4 rows. Products of bytes are made by what the compiler may use: I8MM, which takes
// unsigned codes as they are, DotProd, or neither.
#pragma once
#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "level.h"

namespace mpillama {
namespace {

struct Vec {
  static constexpr int lanes = 4;
  // For how many tokens there are kernels; floating-point weights leave registers for the sums of four.
  static constexpr int float_block_sizes = 1 | 2 | 4;
#if defined(__ARM_FEATURE_MATMUL_INT8)
  static constexpr int block_sizes = 1 | 2 | 4 | 8 | 16;
  static constexpr bool pairs = true, signed_bytes = false;
#elif defined(__ARM_FEATURE_DOTPROD)
  static constexpr int block_sizes = 1 | 2 | 4 | 8 | 16;
  static constexpr bool pairs = false, signed_bytes = true;
#else
  // Unpacking costs little next to the products.
  static constexpr int block_sizes = 1 | 4;
  static constexpr bool pairs = false, signed_bytes = true;
#endif

  using Bytes = uint8x16_t;
  struct Int { int32x4_t v; };
  using Float = float32x4_t;

  static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  template <int shift, int mask> static Bytes right(Bytes a) {
    Bytes r = a;
    if constexpr (shift > 0) r = vshrq_n_u8(a, shift);
    return mask == 0xff >> shift ? r : vandq_u8(r, vdupq_n_u8(mask));
  }
  // Of a, those bits are zero that come from b.
  template <int shift, int mask> static Bytes merge(Bytes a, Bytes b) {
    Bytes shifted = b;
    if constexpr (shift > 0) shifted = vshlq_n_u8(b, shift);
    if constexpr (shift < 0) shifted = vshrq_n_u8(b, -shift);
    return vbslq_u8(vdupq_n_u8(mask), shifted, a);
  }
  static Bytes lookup(const uint8_t* table, Bytes a) { return vqtbl1q_u8(vld1q_u8(table), a); }
  static Bytes either(Bytes a, Bytes b) { return vorrq_u8(a, b); }
  static Bytes differ(Bytes a, Bytes b) { return veorq_u8(a, b); }
  // Lanes of 16 or 32 bits: a >> shift & mask, and a << shift.
  static Bytes right16(Bytes a, int shift, int mask) {
    const uint16x8_t shifted = vshlq_u16(vreinterpretq_u16_u8(a), vdupq_n_s16(int16_t(-shift)));
    return vreinterpretq_u8_u16(vandq_u16(shifted, vdupq_n_u16(uint16_t(mask))));
  }
  template <int shift> static Bytes left16(Bytes a) { return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(a), shift)); }
  static Bytes right32(Bytes a, int shift, uint32_t mask) {
    const uint32x4_t shifted = vshlq_u32(vreinterpretq_u32_u8(a), vdupq_n_s32(-shift));
    return vreinterpretq_u8_u32(vandq_u32(shifted, vdupq_n_u32(mask)));
  }
  template <int shift> static Bytes left32(Bytes a) { return vreinterpretq_u8_u32(vshlq_n_u32(vreinterpretq_u32_u8(a), shift)); }
  // 8 or 16 bits for each lane of 32.
  static Bytes widen8(const uint8_t* p) { return vreinterpretq_u8_u32(vmovl_u16(four_bytes(p))); }
  static Bytes widen16(const uint8_t* p) { return vreinterpretq_u8_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p)))); }
  static Float lanes_to_float(Bytes a) { return vcvtq_f32_s32(vreinterpretq_s32_u8(a)); }
  static Float half_lanes_to_float(Bytes a) { return halves(vmovn_u32(vreinterpretq_u32_u8(a))); }
  // a * factor modulo 256, and a * 3 / 256, in each byte.
  static Bytes times8(Bytes a, int factor) { return vmulq_u8(a, vdupq_n_u8(uint8_t(factor))); }
  static Bytes third(Bytes a) {
    const Bytes reached = vaddq_u8(vcgeq_u8(a, vdupq_n_u8(86)), vcgeq_u8(a, vdupq_n_u8(171)));
    return vsubq_u8(vdupq_n_u8(0), reached);
  }
  // Entries of a table of n words, in each 16 bits.
  template <int n> static Bytes lookup_words(const uint16_t* table, Bytes index) {
    uint16_t words[8];
    vst1q_u16(words, vreinterpretq_u16_u8(index));
    for (uint16_t& word : words) word = table[word];
    return vreinterpretq_u8_u16(vld1q_u16(words));
  }
  // factor * value in each lane
  template <int factor> static Int times(int32_t value) { return {vdupq_n_s32(factor * value)}; }
  // Codes are signed where `signed_bytes` says so.
  template <int n> static Int dots(Int a, const Bytes* w, const int8_t* x) {
    for (int j = 0; j < n; j += 4) {
      const int8x16_t values = vld1q_s8(x + 4 * j);
#if defined(__ARM_FEATURE_MATMUL_INT8)
      a.v = vusdotq_laneq_s32(a.v, w[j], values, 0);
      a.v = vusdotq_laneq_s32(a.v, w[j + 1], values, 1);
      a.v = vusdotq_laneq_s32(a.v, w[j + 2], values, 2);
      a.v = vusdotq_laneq_s32(a.v, w[j + 3], values, 3);
#elif defined(__ARM_FEATURE_DOTPROD)
      a.v = vdotq_laneq_s32(a.v, vreinterpretq_s8_u8(w[j]), values, 0);
      a.v = vdotq_laneq_s32(a.v, vreinterpretq_s8_u8(w[j + 1]), values, 1);
      a.v = vdotq_laneq_s32(a.v, vreinterpretq_s8_u8(w[j + 2]), values, 2);
      a.v = vdotq_laneq_s32(a.v, vreinterpretq_s8_u8(w[j + 3]), values, 3);
#else
      const int32x4_t fours = vreinterpretq_s32_s8(values);
      a.v = vaddq_s32(a.v, two_dots(w + j, vdupq_laneq_s32(fours, 0), vdupq_laneq_s32(fours, 1)));
      a.v = vaddq_s32(a.v, two_dots(w + j + 2, vdupq_laneq_s32(fours, 2), vdupq_laneq_s32(fours, 3)));
#endif
    }
    return a;
  }

  static Float all(float value) { return vdupq_n_f32(value); }
  static Float to_float(Int a) { return vcvtq_f32_s32(a.v); }
  static Float load_float(const uint8_t* p) { return vreinterpretq_f32_u8(vld1q_u8(p)); }
  static Float load_half(const uint8_t* p) { return halves(vreinterpret_u16_u8(vld1_u8(p))); }
  template <int which> static Float load_bf16(const uint8_t* p) {
    const uint32x4_t both = vreinterpretq_u32_u8(vld1q_u8(p));
    return vreinterpretq_f32_u32(which ? vandq_u32(both, vdupq_n_u32(0xffff0000)) : vshlq_n_u32(both, 16));
  }
  static Float load_u8(const uint8_t* p) { return vcvtq_f32_u32(vmovl_u16(four_bytes(p))); }
  static Float load_i8(const uint8_t* p) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(word(p)))))));
  }
  template <int shift> static Float load_nibble(const uint8_t* p) {
    return vcvtq_f32_u32(vmovl_u16(vand_u16(vshl_u16(four_bytes(p), vdup_n_s16(-shift)), vdup_n_u16(15))));
  }
  static Float load_exponent(const uint8_t* p) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vmovl_u16(vqsub_u16(four_bytes(p), vdup_n_u16(1))), 23));
  }
  static Float load_ue4m3(const uint8_t* p) { return vmulq_n_f32(halves(vshl_n_u16(four_bytes(p), 7)), 128.0f); }
  static Float mul(Float a, Float b) { return vmulq_f32(a, b); }
  static Float fma(Float a, Float b, Float c) { return vfmaq_f32(c, a, b); }
  static Float fnma(Float a, Float b, Float c) { return vfmsq_f32(c, a, b); }
  static Float add(Float a, Float b) { return vaddq_f32(a, b); }
  static void store(float* p, Float a, int n) {
    if (n >= 4) {
      vst1q_f32(p, a);
      return;
    }
    float values[4];
    vst1q_f32(values, a);
    std::memcpy(p, values, size_t(n) * sizeof(float));
  }
  static void store_bytes(uint8_t* p, Bytes a) { vst1q_u8(p, a); }
  static void prefetch(const uint8_t* p) { fetch_line(p); }

  static float quantize(const float* x, int8_t* q, int32_t* sums) {
    float32x4_t v[8], top = vdupq_n_f32(0);
    for (int i = 0; i < 8; i++) {
      v[i] = vld1q_f32(x + 4 * i);
      top = vmaxq_f32(top, vabsq_f32(v[i]));
    }
    const float most = vmaxvq_f32(top), inverse = most > 0 ? 127.0f / most : 0.0f;
    for (int half = 0; half < 2; half++) {
      int32x4_t n[4];
      for (int i = 0; i < 4; i++) n[i] = vcvtnq_s32_f32(vmulq_n_f32(v[4 * half + i], inverse));
      sums[half] = vaddvq_s32(vaddq_s32(vaddq_s32(n[0], n[1]), vaddq_s32(n[2], n[3])));
      const int16x8_t first = vcombine_s16(vqmovn_s32(n[0]), vqmovn_s32(n[1]));
      const int16x8_t second = vcombine_s16(vqmovn_s32(n[2]), vqmovn_s32(n[3]));
      vst1q_s8(q + 16 * half, vcombine_s8(vqmovn_s16(first), vqmovn_s16(second)));
    }
    return most / 127.0f;
  }

 private:
  static uint32_t word(const uint8_t* p) {
    uint32_t four;
    std::memcpy(&four, p, 4);
    return four;
  }
  static uint16x4_t four_bytes(const uint8_t* p) { return vget_low_u16(vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(word(p))))); }
  static Float halves(uint16x4_t bits) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
  // Two products of bytes fit in 16 bits, as x is at least -127.
  static int32x4_t two_dots(const Bytes* w, int32x4_t x0, int32x4_t x1) {
    const int8x16_t a = vreinterpretq_s8_u8(w[0]), b = vreinterpretq_s8_u8(w[1]);
    const int8x16_t p = vreinterpretq_s8_s32(x0), q = vreinterpretq_s8_s32(x1);
    const int16x8_t low = vmlal_s8(vmull_s8(vget_low_s8(a), vget_low_s8(p)), vget_low_s8(b), vget_low_s8(q));
    const int16x8_t high = vmlal_high_s8(vmull_high_s8(a, p), b, q);
    return vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  }
};

}  // namespace
}  // namespace mpillama
