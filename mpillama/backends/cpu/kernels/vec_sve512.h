// Vectors for `kernels_impl.h` with SVE of 512 bits: 16 rows.
#pragma once
#include <arm_sve.h>

#include <cstdint>
#include <cstring>

#include "level.h"

namespace mpillama {
namespace {

struct Vec {
  static constexpr int lanes = 16;
  static constexpr int block_sizes = 1 | 2 | 4 | 8 | 16, float_block_sizes = block_sizes;  // for how many tokens there are kernels
  static constexpr bool pairs = false, signed_bytes = true;

  typedef svuint8_t Bytes __attribute__((arm_sve_vector_bits(512)));
  typedef svint32_t Ints __attribute__((arm_sve_vector_bits(512)));
  typedef svfloat32_t Float __attribute__((arm_sve_vector_bits(512)));
  struct Int { Ints v; };

  static Bytes load(const uint8_t* p) { return svld1_u8(svptrue_b8(), p); }
  template <int shift, int mask> static Bytes right(Bytes a) {
    if constexpr (shift > 0) a = svlsr_n_u8_x(svptrue_b8(), a, shift);
    if constexpr (mask != 0xff >> shift) a = svand_n_u8_x(svptrue_b8(), a, mask);
    return a;
  }
  template <int shift, int mask> static Bytes merge(Bytes a, Bytes b) {
    Bytes shifted = b;
    if constexpr (shift > 0) shifted = svlsl_n_u8_x(svptrue_b8(), b, shift);
    if constexpr (shift < 0) shifted = svlsr_n_u8_x(svptrue_b8(), b, -shift);
    return svorr_u8_x(svptrue_b8(), a, svand_n_u8_x(svptrue_b8(), shifted, mask));
  }
  static Bytes lookup(const uint8_t* table, Bytes a) { return svtbl_u8(svld1rq_u8(svptrue_b8(), table), a); }
  static Bytes either(Bytes a, Bytes b) { return svorr_u8_x(svptrue_b8(), a, b); }
  static Bytes differ(Bytes a, Bytes b) { return sveor_u8_x(svptrue_b8(), a, b); }
  // Lanes of 16 or 32 bits: a >> shift & mask, and a << shift.
  static Bytes right16(Bytes a, int shift, int mask) {
    const svuint16_t shifted = svlsr_n_u16_x(svptrue_b16(), svreinterpret_u16_u8(a), uint16_t(shift));
    return svreinterpret_u8_u16(svand_n_u16_x(svptrue_b16(), shifted, uint16_t(mask)));
  }
  template <int shift> static Bytes left16(Bytes a) {
    return svreinterpret_u8_u16(svlsl_n_u16_x(svptrue_b16(), svreinterpret_u16_u8(a), shift));
  }
  static Bytes right32(Bytes a, int shift, uint32_t mask) {
    const svuint32_t shifted = svlsr_n_u32_x(svptrue_b32(), svreinterpret_u32_u8(a), uint32_t(shift));
    return svreinterpret_u8_u32(svand_n_u32_x(svptrue_b32(), shifted, mask));
  }
  template <int shift> static Bytes left32(Bytes a) {
    return svreinterpret_u8_u32(svlsl_n_u32_x(svptrue_b32(), svreinterpret_u32_u8(a), shift));
  }
  // 8 or 16 bits for each lane of 32.
  static Bytes widen8(const uint8_t* p) { return svreinterpret_u8_u32(svld1ub_u32(svptrue_b32(), p)); }
  static Bytes widen16(const uint8_t* p) { return svreinterpret_u8_u32(words(p)); }
  static Float lanes_to_float(Bytes a) { return svcvt_f32_s32_x(svptrue_b32(), svreinterpret_s32_u8(a)); }
  static Float half_lanes_to_float(Bytes a) { return halves(svreinterpret_u32_u8(a)); }
  // a * factor modulo 256, and a * 3 / 256, in each byte.
  static Bytes times8(Bytes a, int factor) { return svmul_n_u8_x(svptrue_b8(), a, uint8_t(factor)); }
  static Bytes third(Bytes a) {
    const svuint8_t one = svdup_n_u8_z(svcmpge_n_u8(svptrue_b8(), a, 86), 1);
    return svadd_n_u8_m(svcmpge_n_u8(svptrue_b8(), a, 171), one, 1);
  }
  // Entries of a table of n words, in each 16 bits.
  template <int n> static Bytes lookup_words(const uint16_t* table, Bytes index) {
    const svuint32_t both = svreinterpret_u32_u8(index), first = svand_n_u32_x(svptrue_b32(), both, 0xffff);
    const svuint32_t low = svld1uh_gather_u32index_u32(svptrue_b32(), table, first);
    const svuint32_t high = svld1uh_gather_u32index_u32(svptrue_b32(), table, svlsr_n_u32_x(svptrue_b32(), both, 16));
    return svreinterpret_u8_u32(svorr_u32_x(svptrue_b32(), low, svlsl_n_u32_x(svptrue_b32(), high, 16)));
  }
  // factor * value in each lane
  template <int factor> static Int times(int32_t value) { return {svdup_n_s32(factor * value)}; }
  // Codes are signed where `signed_bytes` says so. Two sums: A64FX waits 9 cycles for each, and looks few instructions ahead.
  template <int n> static Int dots(Int a, const Bytes* w, const int8_t* x) {
    Ints b = svdup_n_s32(0);
    for (int j = 0; j < n; j += 4) {
      const svint8_t values = svld1rq_s8(svptrue_b8(), x + 4 * j);
      a.v = svdot_lane_s32(a.v, svreinterpret_s8_u8(w[j]), values, 0);
      b = svdot_lane_s32(b, svreinterpret_s8_u8(w[j + 1]), values, 1);
      a.v = svdot_lane_s32(a.v, svreinterpret_s8_u8(w[j + 2]), values, 2);
      b = svdot_lane_s32(b, svreinterpret_s8_u8(w[j + 3]), values, 3);
    }
    return {svadd_s32_x(svptrue_b32(), a.v, b)};
  }

  static Float all(float value) { return svdup_n_f32(value); }
  static Float to_float(Int a) { return svcvt_f32_s32_x(svptrue_b32(), a.v); }
  static Float load_float(const uint8_t* p) { return svreinterpret_f32_u8(load(p)); }
  static Float load_half(const uint8_t* p) { return halves(words(p)); }
  template <int which> static Float load_bf16(const uint8_t* p) {
    const svuint32_t both = svreinterpret_u32_u8(load(p));
    return svreinterpret_f32_u32(which ? svand_n_u32_x(svptrue_b32(), both, 0xffff0000) : svlsl_n_u32_x(svptrue_b32(), both, 16));
  }
  static Float load_u8(const uint8_t* p) { return svcvt_f32_u32_x(svptrue_b32(), svld1ub_u32(svptrue_b32(), p)); }
  static Float load_i8(const uint8_t* p) {
    return svcvt_f32_s32_x(svptrue_b32(), svld1sb_s32(svptrue_b32(), reinterpret_cast<const int8_t*>(p)));
  }
  template <int shift> static Float load_nibble(const uint8_t* p) {
    const svuint32_t bytes = svlsr_n_u32_x(svptrue_b32(), svld1ub_u32(svptrue_b32(), p), shift);
    return svcvt_f32_u32_x(svptrue_b32(), svand_n_u32_x(svptrue_b32(), bytes, 15));
  }
  static Float load_exponent(const uint8_t* p) {
    const svuint32_t less = svqsub_n_u32(svld1ub_u32(svptrue_b32(), p), 1);
    return svreinterpret_f32_u32(svlsl_n_u32_x(svptrue_b32(), less, 23));
  }
  static Float load_ue4m3(const uint8_t* p) {
    return svmul_n_f32_x(svptrue_b32(), halves(svlsl_n_u32_x(svptrue_b32(), svld1ub_u32(svptrue_b32(), p), 7)), 128.0f);
  }
  static Float mul(Float a, Float b) { return svmul_f32_x(svptrue_b32(), a, b); }
  static Float fma(Float a, Float b, Float c) { return svmla_f32_x(svptrue_b32(), c, a, b); }
  static Float fnma(Float a, Float b, Float c) { return svmls_f32_x(svptrue_b32(), c, a, b); }
  static Float add(Float a, Float b) { return svadd_f32_x(svptrue_b32(), a, b); }
  static void store(float* p, Float a, int n) { svst1_f32(svwhilelt_b32_s32(0, n), p, a); }
  static void store_bytes(uint8_t* p, Bytes a) { svst1_u8(svptrue_b8(), p, a); }
  static void prefetch(const uint8_t* p) { fetch_line(p); }

  static float quantize(const float* x, int8_t* q, int32_t* sums) {
    const svbool_t all = svptrue_b32();
    const Float v[2] = {svld1_f32(all, x), svld1_f32(all, x + 16)};
    const float most = svmaxv_f32(all, svmax_f32_x(all, svabs_f32_x(all, v[0]), svabs_f32_x(all, v[1])));
    const float inverse = most > 0 ? 127.0f / most : 0.0f;
    for (int half = 0; half < 2; half++) {
      const svint32_t n = svcvt_s32_f32_x(all, svrintn_f32_x(all, svmul_n_f32_x(all, v[half], inverse)));
      sums[half] = int32_t(svaddv_s32(all, n));
      svst1b_s32(all, q + 16 * half, n);
    }
    return most / 127.0f;
  }

 private:
  static svuint32_t words(const uint8_t* p) { return svld1uh_u32(svptrue_b32(), reinterpret_cast<const uint16_t*>(p)); }
  static Float halves(svuint32_t bits) { return svcvt_f32_f16_x(svptrue_b32(), svreinterpret_f16_u32(bits)); }
};

}  // namespace
}  // namespace mpillama
