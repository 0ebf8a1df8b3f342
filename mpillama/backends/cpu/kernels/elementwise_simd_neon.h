// Vectors of floats for attention and the small ops, with NEON: 8 lanes in two registers, so that chains of sums are long
// enough for a single row.
#pragma once
#include <arm_neon.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "level.h"

namespace mpillama {
namespace {

struct Simd {
  static constexpr int width = 8;
  static constexpr int max_rows = 6;  // of the products in attention: 4 * max_rows accumulators and 5 more registers
  static constexpr int panel_vectors = 3, panel_columns = 4;  // likewise of those in panels: 24 accumulators and 7 more
  struct F { float32x4_t a, b; };

  static F zero() { return all(0); }
  static F all(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static F load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static F load(const float* p, size_t n) {
    float values[8] = {};
    std::memcpy(values, p, n * sizeof(float));
    return load(values);
  }
  static F load(const Half* p) {
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&p->bits));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
  static F load(const Bf16* p) {
    const uint16x8_t bits = vld1q_u16(&p->bits);
    return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(bits), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(bits, 16))};
  }
  static F load(const int8_t* p) { return from_ints(vmovl_s8(vld1_s8(p))); }
  static F load(const LowNibble* p) { return load_nibbles<0>(&p->bits); }
  static F load(const HighNibble* p) { return load_nibbles<4>(&p->bits); }
  // Codes of 4 bits less 8, from the lower or the upper half of each byte.
  template <int shift> static F load_nibbles(const uint8_t* p) {
    const uint8x8_t bytes = vld1_u8(p), codes = vand_u8(vshl_u8(bytes, vdup_n_s8(-shift)), vdup_n_u8(15));
    return from_ints(vreinterpretq_s16_u16(vsubl_u8(codes, vdup_n_u8(8))));
  }
  static void store(float* p, F x) {
    vst1q_f32(p, x.a);
    vst1q_f32(p + 4, x.b);
  }
  static void store(float* p, F x, size_t n) {
    float values[8];
    store(values, x);
    std::memcpy(p, values, n * sizeof(float));
  }
  static void store(Half* p, F x) {
    vst1q_u16(&p->bits, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(x.a), x.b)));
  }
  static void store(Bf16* p, F x) {
    const auto rounded = [](float32x4_t v) {
      const uint32x4_t bits = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
      return vaddq_u32(bits, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
    };
    vst1q_u16(&p->bits, vshrn_high_n_u32(vshrn_n_u32(rounded(x.a), 16), rounded(x.b), 16));
  }
  static float to_float(Half h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h.bits))), 0); }
  static Half to_half(float x) { return {vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0)}; }

  static F add(F x, F y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
  static F sub(F x, F y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
  static F mul(F x, F y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
  static F div(F x, F y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
  // The second argument where either is not a number.
  static F min(F x, F y) { return if_less(x, y, x, y); }
  static F max(F x, F y) { return if_less(y, x, x, y); }
  static F abs(F x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
  static F round(F x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
  // n from -126 to 127; where n is not a number, x is none either.
  static F times_power_of_2(F x, F n) {
    const auto power = [](float32x4_t v) {
      return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(v), vdupq_n_s32(127)), 23));
    };
    return {vmulq_f32(x.a, power(n.a)), vmulq_f32(x.b, power(n.b))};
  }
  static F if_less(F x, F y, F yes, F no) {
    return {vbslq_f32(vcltq_f32(x.a, y.a), yes.a, no.a), vbslq_f32(vcltq_f32(x.b, y.b), yes.b, no.b)};
  }
  // Each pair of lanes exchanged.
  static F swap_pairs(F x) { return {vrev64q_f32(x.a), vrev64q_f32(x.b)}; }
  static float sum(F x) { return vaddvq_f32(vaddq_f32(x.a, x.b)); }
  static bool at_most(F x, F y) { return vminvq_u32(vandq_u32(vcleq_f32(x.a, y.a), vcleq_f32(x.b, y.b))) != 0; }
  static float max_of(F x) { return vmaxvq_f32(vmaxq_f32(x.a, x.b)); }
  static void prefetch(const void* p) { fetch_line(p); }

 private:
  static F from_ints(int16x8_t x) {
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
  }
};

using F = Simd::F;

}  // namespace
}  // namespace mpillama
