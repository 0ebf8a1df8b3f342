// Vectors for `kernels_impl.h` with AVX2, FMA and F16C: 8 rows.
#pragma once
#include <immintrin.h>

#include <cstdint>
#include <cstring>

#include "level.h"

namespace mpillama {
namespace {

struct Vec {
  static constexpr int lanes = 8;
  // For how many tokens there are kernels; floating-point weights leave registers for the sums of four.
  static constexpr int block_sizes = 1 | 2 | 4 | 8 | 16, float_block_sizes = 1 | 2 | 4;
  static constexpr bool pairs = false;

  using Bytes = __m256i;
  struct Int { __m256i v; };
  using Float = __m256;

  static Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  template <int shift, int mask> static Bytes right(Bytes a) {
    return _mm256_and_si256(_mm256_srli_epi16(a, shift), _mm256_set1_epi8(char(mask)));
  }
  template <int shift, int mask> static Bytes merge(Bytes a, Bytes b) {
    const Bytes shifted = shift >= 0 ? _mm256_slli_epi16(b, shift >= 0 ? shift : 0) : _mm256_srli_epi16(b, shift < 0 ? -shift : 0);
    return _mm256_or_si256(a, _mm256_and_si256(shifted, _mm256_set1_epi8(char(mask))));
  }
  static Bytes lookup(const uint8_t* table, Bytes a) {
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), a);
  }
  static Bytes either(Bytes a, Bytes b) { return _mm256_or_si256(a, b); }
  static Bytes differ(Bytes a, Bytes b) { return _mm256_xor_si256(a, b); }
  // Lanes of 16 or 32 bits: a >> shift & mask, and a << shift.
  static Bytes right16(Bytes a, int shift, int mask) {
    return _mm256_and_si256(_mm256_srl_epi16(a, _mm_cvtsi32_si128(shift)), _mm256_set1_epi16(short(mask)));
  }
  template <int shift> static Bytes left16(Bytes a) { return _mm256_slli_epi16(a, shift); }
  static Bytes right32(Bytes a, int shift, uint32_t mask) {
    return _mm256_and_si256(_mm256_srl_epi32(a, _mm_cvtsi32_si128(shift)), _mm256_set1_epi32(int(mask)));
  }
  template <int shift> static Bytes left32(Bytes a) { return _mm256_slli_epi32(a, shift); }
  // 8 or 16 bits for each lane of 32.
  static Bytes widen8(const uint8_t* p) { return _mm256_cvtepu8_epi32(eight(p)); }
  static Bytes widen16(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float lanes_to_float(Bytes a) { return _mm256_cvtepi32_ps(a); }
  static Float half_lanes_to_float(Bytes a) {
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, a), 0x08);
    return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
  }
  // a * factor modulo 256, in each byte.
  static Bytes times8(Bytes a, int factor) {
    const __m256i f = _mm256_set1_epi16(short(factor));
    const __m256i odd = _mm256_slli_epi16(_mm256_mullo_epi16(_mm256_srli_epi16(a, 8), f), 8);
    return _mm256_or_si256(odd, _mm256_and_si256(_mm256_mullo_epi16(a, f), _mm256_set1_epi16(255)));
  }
  // a * 3 / 256, in each byte.
  static Bytes third(Bytes a) {
    const auto reaches = [&](int n) { return _mm256_cmpeq_epi8(_mm256_max_epu8(a, _mm256_set1_epi8(char(n))), a); };
    return _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_add_epi8(reaches(86), reaches(171)));
  }
  // Entries of a table of n words, in each 16 bits; reads one word past the entry.
  template <int n> static Bytes lookup_words(const uint16_t* table, Bytes index) {
    const int* t = reinterpret_cast<const int*>(table);
    const __m256i first = _mm256_and_si256(index, _mm256_set1_epi32(0xffff)), second = _mm256_srli_epi32(index, 16);
    const __m256i a = _mm256_and_si256(_mm256_i32gather_epi32(t, first, 2), _mm256_set1_epi32(0xffff));
    return _mm256_or_si256(a, _mm256_slli_epi32(_mm256_i32gather_epi32(t, second, 2), 16));
  }
  // factor * value in each lane; a power of two or 0
  template <int factor> static Int times(int32_t value) {
    if (!factor) return {_mm256_setzero_si256()};
    return {_mm256_slli_epi32(_mm256_set1_epi32(value), __builtin_ctz(unsigned(factor)))};
  }
  // Codes as they are unpacked, and as vpmaddubsw wants them: unsigned, or as sizes and what has the signs.
  struct Raw {
    __m256i codes;
    Raw() = default;
    explicit Raw(Bytes codes) : codes(codes) {}
  };
  template <bool wide> struct Codes {
    __m256i size, value;
    Codes() = default;
    explicit Codes(Bytes codes) : size(codes) {
      if (!wide) return;
      value = _mm256_xor_si256(codes, _mm256_set1_epi8(char(0x80)));
      size = _mm256_abs_epi8(value);
    }
    explicit Codes(Raw raw) : Codes(raw.codes) {}
  };
  // Four values of x, for each lane of 32 bits.
  static Bytes four(const int8_t* x) {
    int32_t values;
    std::memcpy(&values, x, 4);
    return _mm256_set1_epi32(values);
  }
  // Products with codes, neighbours added up in 16 bits; the sum of such; and neighbours of such added to a.
  template <bool wide> static Bytes products(const Codes<wide>& w, Bytes x) {
    return _mm256_maddubs_epi16(w.size, wide ? _mm256_sign_epi8(x, w.value) : x);
  }
  static Int add(Int a, Int b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static Bytes add16(Bytes a, Bytes b) { return at_once(_mm256_add_epi16(a, b)); }
  static Int add_pairs(Int a, Bytes pairs) {
    return {at_once(_mm256_add_epi32(a.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))))};
  }
  // Compilers like to put off all sums until there are more products than registers.
  static __m256i at_once(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
  }

  static Float all(float value) { return _mm256_set1_ps(value); }
  static Float to_float(Int a) { return _mm256_cvtepi32_ps(a.v); }
  static Float load_float(const uint8_t* p) { return _mm256_loadu_ps(reinterpret_cast<const float*>(p)); }
  static Float load_half(const uint8_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <int which> static Float load_bf16(const uint8_t* p) {
    const __m256i pairs = load(p);
    return _mm256_castsi256_ps(which ? _mm256_and_si256(pairs, _mm256_set1_epi32(int(0xffff0000))) : _mm256_slli_epi32(pairs, 16));
  }
  static __m128i eight(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
  static Float load_u8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight(p))); }
  static Float load_i8(const uint8_t* p) { return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight(p))); }
  template <int shift> static Float load_nibble(const uint8_t* p) {
    const __m256i bytes = _mm256_cvtepu8_epi32(eight(p));
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(bytes, shift), _mm256_set1_epi32(15)));
  }
  static Float load_exponent(const uint8_t* p) {
    const __m256i e = _mm256_max_epi32(_mm256_cvtepu8_epi32(eight(p)), _mm256_set1_epi32(1));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_sub_epi32(e, _mm256_set1_epi32(1)), 23));
  }
  static Float load_ue4m3(const uint8_t* p) {
    return _mm256_mul_ps(_mm256_cvtph_ps(_mm_slli_epi16(_mm_cvtepu8_epi16(eight(p)), 7)), _mm256_set1_ps(128.0f));
  }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float fnma(Float a, Float b, Float c) { return _mm256_fnmadd_ps(a, b, c); }
  static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static void store(float* p, Float a, int n) {
    if (n >= 8) {
      _mm256_storeu_ps(p, a);
    } else {
      const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
      _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(n), lane), a);
    }
  }
  static void store_bytes(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a); }
  static void prefetch(const uint8_t* p) { fetch_line(p); }

  static float quantize(const float* x, int8_t* q, int32_t* sums) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    __m256 v[4], top = _mm256_setzero_ps();
    for (int i = 0; i < 4; i++) {
      v[i] = _mm256_loadu_ps(x + 8 * i);
      top = _mm256_max_ps(top, _mm256_andnot_ps(sign, v[i]));
    }
    __m128 t = _mm_max_ps(_mm256_castps256_ps128(top), _mm256_extractf128_ps(top, 1));
    t = _mm_max_ps(t, _mm_movehl_ps(t, t));
    const float most = _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
    const __m256 inverse = _mm256_set1_ps(most > 0 ? 127.0f / most : 0.0f);
    __m256i n[4];
    for (int i = 0; i < 4; i++) n[i] = _mm256_cvtps_epi32(_mm256_mul_ps(v[i], inverse));
    for (int half = 0; half < 2; half++) {
      const __m256i total = _mm256_add_epi32(n[2 * half], n[2 * half + 1]);
      __m128i s = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
      s = _mm_add_epi32(s, _mm_shuffle_epi32(s, 0x4e));
      sums[half] = _mm_cvtsi128_si32(_mm_add_epi32(s, _mm_shuffle_epi32(s, 0xb1)));
    }
    const __m256i bytes = _mm256_packs_epi16(_mm256_packs_epi32(n[0], n[1]), _mm256_packs_epi32(n[2], n[3]));
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(q), _mm256_permutevar8x32_epi32(bytes, order));
    return most / 127.0f;
  }
};

}  // namespace
}  // namespace mpillama
