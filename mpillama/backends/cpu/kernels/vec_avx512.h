// Vectors for `kernels_impl.h` with AVX512 and VNNI: 16 rows.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "level.h"

namespace mpillama {
namespace {

struct Vec {
  static constexpr int lanes = 16;
  static constexpr int block_sizes = 1 | 2 | 4 | 8 | 16, float_block_sizes = block_sizes;  // for how many tokens there are kernels
  static constexpr bool pairs = false, signed_bytes = false;

  using Bytes = __m512i;
  struct Int { __m512i v; };
  using Float = __m512;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  template <int shift, int mask> static Bytes right(Bytes a) {
    return _mm512_and_si512(_mm512_srli_epi16(a, shift), _mm512_set1_epi8(char(mask)));
  }
  template <int shift, int mask> static Bytes merge(Bytes a, Bytes b) {
    const Bytes shifted = shift >= 0 ? _mm512_slli_epi16(b, shift >= 0 ? shift : 0) : _mm512_srli_epi16(b, shift < 0 ? -shift : 0);
    return _mm512_ternarylogic_epi64(a, shifted, _mm512_set1_epi8(char(mask)), 0xF8);  // a | (b & c)
  }
  static Bytes lookup(const uint8_t* table, Bytes a) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), a);
  }
  static Bytes either(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }
  static Bytes differ(Bytes a, Bytes b) { return _mm512_xor_si512(a, b); }
  // Lanes of 16 or 32 bits: a >> shift & mask, and a << shift.
  static Bytes right16(Bytes a, int shift, int mask) {
    return _mm512_and_si512(_mm512_srl_epi16(a, _mm_cvtsi32_si128(shift)), _mm512_set1_epi16(short(mask)));
  }
  template <int shift> static Bytes left16(Bytes a) { return _mm512_slli_epi16(a, shift); }
  static Bytes right32(Bytes a, int shift, uint32_t mask) {
    return _mm512_and_si512(_mm512_srl_epi32(a, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(int(mask)));
  }
  template <int shift> static Bytes left32(Bytes a) { return _mm512_slli_epi32(a, shift); }
  // 8 or 16 bits for each lane of 32.
  static Bytes widen8(const uint8_t* p) { return _mm512_cvtepu8_epi32(sixteen(p)); }
  static Bytes widen16(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Float lanes_to_float(Bytes a) { return _mm512_cvtepi32_ps(a); }
  static Float half_lanes_to_float(Bytes a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
  // a * factor modulo 256, in each byte.
  static Bytes times8(Bytes a, int factor) {
    const __m512i f = _mm512_set1_epi16(short(factor));
    const __m512i odd = _mm512_slli_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(a, 8), f), 8);
    return _mm512_ternarylogic_epi64(odd, _mm512_mullo_epi16(a, f), _mm512_set1_epi16(255), 0xF8);
  }
  // a * 3 / 256, in each byte.
  static Bytes third(Bytes a) {
    const __m512i one = _mm512_set1_epi8(1);
    const __m512i first = _mm512_maskz_mov_epi8(_mm512_cmpge_epu8_mask(a, _mm512_set1_epi8(86)), one);
    return _mm512_mask_add_epi8(first, _mm512_cmpge_epu8_mask(a, _mm512_set1_epi8(char(171))), first, one);
  }
  // Entries of a table of n words, in each 16 bits.
  template <int n> static Bytes lookup_words(const uint16_t* table, Bytes index) {
    if constexpr (n <= 64) {
      return _mm512_permutex2var_epi16(_mm512_loadu_si512(table), index, _mm512_loadu_si512(table + 32));
    } else if constexpr (n <= 1024) {
      const __mmask32 upper = _mm512_test_epi16_mask(index, _mm512_set1_epi16(n / 2));
      return _mm512_mask_blend_epi16(upper, lookup_words<n / 2>(table, index), lookup_words<n / 2>(table + n / 2, index));
    } else {
      const __m512i first = _mm512_and_si512(index, _mm512_set1_epi32(0xffff)), second = _mm512_srli_epi32(index, 16);
      const __m512i a = _mm512_and_si512(_mm512_i32gather_epi32(first, table, 2), _mm512_set1_epi32(0xffff));
      return _mm512_or_si512(a, _mm512_slli_epi32(_mm512_i32gather_epi32(second, table, 2), 16));
    }
  }
  // factor * value in each lane; a power of two or 0
  template <int factor> static Int times(int32_t value) {
    if (!factor) return {_mm512_setzero_si512()};
    return {_mm512_slli_epi32(_mm512_set1_epi32(value), __builtin_ctz(unsigned(factor)))};
  }
  template <int n> static Int dots(Int a, const Bytes* w, const int8_t* x) {
    for (int j = 0; j < n; j++) {
      int32_t four;
      std::memcpy(&four, x + 4 * j, 4);
      a.v = _mm512_dpbusd_epi32(a.v, w[j], _mm512_set1_epi32(four));
    }
    return a;
  }

  static Float all(float value) { return _mm512_set1_ps(value); }
  static Float to_float(Int a) { return _mm512_cvtepi32_ps(a.v); }
  static Float load_float(const uint8_t* p) { return _mm512_loadu_ps(p); }
  static Float load_half(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  template <int which> static Float load_bf16(const uint8_t* p) {
    const __m512i pairs = load(p);
    return _mm512_castsi512_ps(which ? _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))) : _mm512_slli_epi32(pairs, 16));
  }
  static __m128i sixteen(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
  static Float load_u8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(sixteen(p))); }
  static Float load_i8(const uint8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen(p))); }
  template <int shift> static Float load_nibble(const uint8_t* p) {
    const __m512i bytes = _mm512_cvtepu8_epi32(sixteen(p));
    return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(bytes, shift), _mm512_set1_epi32(15)));
  }
  static Float load_exponent(const uint8_t* p) {
    const __m512i e = _mm512_max_epi32(_mm512_cvtepu8_epi32(sixteen(p)), _mm512_set1_epi32(1));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(1)), 23));
  }
  static Float load_ue4m3(const uint8_t* p) {
    const __m256i halves = _mm256_slli_epi16(_mm256_cvtepu8_epi16(sixteen(p)), 7);
    return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(128.0f));
  }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float fnma(Float a, Float b, Float c) { return _mm512_fnmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static void store(float* p, Float a, int n) {
    if (n >= 16) {
      _mm512_storeu_ps(p, a);
    } else {
      _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a);
    }
  }
  static void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a); }
  static void prefetch(const uint8_t* p) { fetch_line(p); }

  static float quantize(const float* x, int8_t* q, int32_t* sums) {
    const __m512 a = _mm512_loadu_ps(x), b = _mm512_loadu_ps(x + 16);
    const float top = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(a), _mm512_abs_ps(b)));
    const __m512 inverse = _mm512_set1_ps(top > 0 ? 127.0f / top : 0.0f);
    const __m512i ia = _mm512_cvtps_epi32(_mm512_mul_ps(a, inverse)), ib = _mm512_cvtps_epi32(_mm512_mul_ps(b, inverse));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q), _mm512_cvtepi32_epi8(ia));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + 16), _mm512_cvtepi32_epi8(ib));
    sums[0] = _mm512_reduce_add_epi32(ia);
    sums[1] = _mm512_reduce_add_epi32(ib);
    return top / 127.0f;
  }
};

}  // namespace
}  // namespace mpillama
