// Vectors for `kernels_impl.h` with AVX512 and VNNI: 16 rows.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace mpillama {
namespace {

struct Vec {
  static constexpr int lanes = 16;
  static constexpr bool signed_codes = false;
  static constexpr int block_sizes = 1 | 2 | 4 | 8 | 16;  // for how many tokens there are kernels

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
  // factor * value in each lane; a power of two or 0
  template <int factor> static Int times(int32_t value) {
    if (!factor) return {_mm512_setzero_si512()};
    return {_mm512_slli_epi32(_mm512_set1_epi32(value), __builtin_ctz(unsigned(factor)))};
  }
  template <bool> static Int dot(Int a, Bytes w, const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return {_mm512_dpbusd_epi32(a.v, w, _mm512_set1_epi32(four))};
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
  static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }

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
