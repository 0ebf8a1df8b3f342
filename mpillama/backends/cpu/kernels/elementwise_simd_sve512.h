// Vectors of floats for attention and the small ops, with SVE of 512 bits: 16 lanes.
#pragma once
#include <arm_sve.h>

#include <cstddef>
#include <cstdint>

#include "attention.h"
#include "level.h"

namespace mpillama {
namespace {

struct Simd {
  static constexpr int width = 16;
  static constexpr int max_rows = 12;  // of the products in attention: 2 * max_rows accumulators and 3 more registers
  static constexpr int panel_vectors = 3, panel_columns = 8;  // likewise of those in panels: 24 accumulators and 4 more
  typedef svfloat32_t F __attribute__((arm_sve_vector_bits(512)));

  static svbool_t first(size_t n) { return svwhilelt_b32_u64(0, n); }
  static svbool_t every() { return svptrue_b32(); }
  static F zero() { return all(0); }
  static F all(float x) { return svdup_n_f32(x); }
  static F load(const float* p) { return svld1_f32(every(), p); }
  static F load(const float* p, size_t n) { return svld1_f32(first(n), p); }
  static F load(const Half* p) { return halves(svld1uh_u32(every(), &p->bits)); }
  static F load(const Bf16* p) { return svreinterpret_f32_u32(svlsl_n_u32_x(every(), svld1uh_u32(every(), &p->bits), 16)); }
  static F load(const int8_t* p) { return svcvt_f32_s32_x(every(), svld1sb_s32(every(), p)); }
  static F load(const LowNibble* p) { return load_nibbles<0>(&p->bits); }
  static F load(const HighNibble* p) { return load_nibbles<4>(&p->bits); }
  // Codes of 4 bits less 8, from the lower or the upper half of each byte.
  template <int shift> static F load_nibbles(const uint8_t* p) {
    const svuint32_t codes = svand_n_u32_x(every(), svlsr_n_u32_x(every(), svld1ub_u32(every(), p), shift), 15);
    return svcvt_f32_s32_x(every(), svsub_n_s32_x(every(), svreinterpret_s32_u32(codes), 8));
  }
  static void store(float* p, F x) { svst1_f32(every(), p, x); }
  static void store(float* p, F x, size_t n) { svst1_f32(first(n), p, x); }
  static void store(Half* p, F x) { svst1h_u32(every(), &p->bits, svreinterpret_u32_f16(svcvt_f16_f32_x(every(), x))); }
  static void store(Bf16* p, F x) {
    const svuint32_t bits = svreinterpret_u32_f32(x), odd = svand_n_u32_x(every(), svlsr_n_u32_x(every(), bits, 16), 1);
    const svuint32_t rounded = svadd_u32_x(every(), bits, svadd_n_u32_x(every(), odd, 0x7fff));
    svst1h_u32(every(), &p->bits, svlsr_n_u32_x(every(), rounded, 16));
  }
  static float to_float(Half h) { return first_of(halves(svdup_n_u32(h.bits))); }
  static Half to_half(float x) {
    Half h[16];
    store(h, all(x));
    return h[0];
  }

  static F add(F a, F b) { return svadd_f32_x(every(), a, b); }
  static F sub(F a, F b) { return svsub_f32_x(every(), a, b); }
  static F mul(F a, F b) { return svmul_f32_x(every(), a, b); }
  static F div(F a, F b) { return svdiv_f32_x(every(), a, b); }
  static F fma(F a, F b, F c) { return svmla_f32_x(every(), c, a, b); }
  // The second argument where either is not a number.
  static F min(F a, F b) { return if_less(a, b, a, b); }
  static F max(F a, F b) { return if_less(b, a, a, b); }
  static F abs(F a) { return svabs_f32_x(every(), a); }
  static F round(F a) { return svrintn_f32_x(every(), a); }
  static F times_power_of_2(F a, F n) { return svscale_f32_x(every(), a, svcvt_s32_f32_x(every(), n)); }
  static F if_less(F a, F b, F yes, F no) { return svsel_f32(svcmplt_f32(every(), a, b), yes, no); }
  // Each pair of lanes exchanged.
  static F swap_pairs(F a) { return svreinterpret_f32_u64(svrevw_u64_x(svptrue_b64(), svreinterpret_u64_f32(a))); }
  static float sum(F a) { return svaddv_f32(every(), a); }
  static bool at_most(F a, F b) { return !svptest_any(every(), svnot_b_z(every(), svcmple_f32(every(), a, b))); }
  static float max_of(F a) { return svmaxv_f32(every(), a); }
  static void prefetch(const void* p) { fetch_line(p); }

 private:
  static F halves(svuint32_t bits) { return svcvt_f32_f16_x(every(), svreinterpret_f16_u32(bits)); }
  static float first_of(F a) { return svlastb_f32(svptrue_pat_b32(SV_VL1), a); }
};

using F = Simd::F;

}  // namespace
}  // namespace mpillama
