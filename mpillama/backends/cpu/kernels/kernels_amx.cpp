#include "vec_avx512.h"
// After the vectors.
#include "amx.h"
#include "codec.h"
#include "kernels.h"

namespace mpillama {
namespace {

constexpr size_t ahead = 2048;

// Floats whose upper halves are x in bf16, rounded to nearest. AVX512_BF16 has an instruction for it, which takes longer
// than this, and then still a permutation.
inline __m512i rounded(__m512 x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); }

inline __m256i to_bf16(const float* x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(_mm512_loadu_ps(x)), 16));
}

void tile_row(const float* x, size_t n_groups, int row, uint16_t* tiles) {
  for (size_t g = 0; g < n_groups; g++) {
    __m256i* out = reinterpret_cast<__m256i*>(tiles + g * tile_values + 32 * row);
    _mm256_storeu_si256(out, to_bf16(x + 32 * g));
    _mm256_storeu_si256(out + 1, to_bf16(x + 32 * g + 16));
  }
}

// Two columns as 16 pairs.
inline void store_pairs(uint16_t* out, __m512 first, __m512 second) {
  _mm512_storeu_si512(out, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(rounded(first), 16), rounded(second)));
}

template <int type>
void expand(const uint8_t* panel, size_t first, size_t last, uint16_t* out) {
  constexpr Format f = format_of(type);
  constexpr size_t per_unit = size_t(f.unit / 32);
  const __m512i byte = _mm512_set1_epi32(255);
  for (size_t g = first; g < last; g++, out += tile_values) {
    const uint8_t* unit = panel + g / per_unit * unit_bytes(f);
    const uint8_t* group = unit + f.factor_bytes + g % per_unit * group_bytes(f);
    for (size_t i = 0; i < group_bytes(f); i += 64) Vec::prefetch(group + ahead + i);
    if constexpr (type == BF16) {
      std::memcpy(out, group, 1024);
    } else if constexpr (type == F16) {
      for (int k = 0; k < 32; k += 2)
        store_pairs(out + 16 * k, Vec::load_half(group + 32 * k), Vec::load_half(group + 32 * k + 32));
    } else {
      Vec::Bytes w[8];
      unpack<type>(nullptr, unit, int(g % per_unit), 0, w);
      const FactorVecs fv = factors<type>(unit, int(g % per_unit), 0);
      for (int j = 0; j < 8; j++) {
        const bool second = has_halves(f) && j >= 4;
        const __m512 s = second ? fv.s1 : fv.s0;
        __m512 base = _mm512_mul_ps(s, _mm512_set1_ps(float(-f.offset)));
        if constexpr (has_min(f)) base = _mm512_sub_ps(base, second ? fv.m1 : fv.m0);
        const auto value = [&](__m512i code) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(code), s, base); };
        store_pairs(out + 64 * j, value(_mm512_and_si512(w[j], byte)),
                    value(_mm512_and_si512(_mm512_srli_epi32(w[j], 8), byte)));
        store_pairs(out + 64 * j + 32, value(_mm512_and_si512(_mm512_srli_epi32(w[j], 16), byte)),
                    value(_mm512_srli_epi32(w[j], 24)));
      }
    }
  }
}

void multiply(const uint16_t* a, size_t a_step, const uint16_t* b0, const uint16_t* b1, size_t n_groups, float* c,
              size_t stride, bool add, Expansion& meanwhile) {
  const uint16_t* lower = a + a_step * tile_values;
  const size_t bytes = stride * sizeof(float);
  if (add) {
    tile_load<0>(c, bytes), tile_load<1>(c + 16, bytes);
    tile_load<2>(c + 16 * stride, bytes), tile_load<3>(c + 16 * stride + 16, bytes);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  for (size_t at = 0; at < n_groups * tile_values; at += tile_values) {
    tile_load<4>(a + at, 64), tile_load<5>(lower + at, 64);
    tile_load<6>(b0 + at, 64), tile_load<7>(b1 + at, 64);
    tile_product<0, 4, 6>(), tile_product<1, 4, 7>(), tile_product<2, 5, 6>(), tile_product<3, 5, 7>();
    if (at % (4 * tile_values) == 0) meanwhile.step();
  }
  tile_store<0>(c, bytes), tile_store<1>(c + 16, bytes);
  tile_store<2>(c + 16 * stride, bytes), tile_store<3>(c + 16 * stride + 16, bytes);
}

constexpr AmxKernels make_kernels() {
  AmxKernels k{};
  k.tile_row = tile_row;
  k.multiply = multiply;
  k.begin = tiles_begin;
  k.end = tiles_end;
  k.expand[F16] = expand<F16>, k.expand[BF16] = expand<BF16>;
  k.expand[Q4_0] = expand<Q4_0>, k.expand[Q4_1] = expand<Q4_1>, k.expand[Q5_0] = expand<Q5_0>;
  k.expand[Q5_1] = expand<Q5_1>, k.expand[Q8_0] = expand<Q8_0>, k.expand[Q2_K] = expand<Q2_K>;
  k.expand[Q3_K] = expand<Q3_K>, k.expand[Q4_K] = expand<Q4_K>, k.expand[Q5_K] = expand<Q5_K>;
  k.expand[Q6_K] = expand<Q6_K>, k.expand[IQ4_NL] = expand<IQ4_NL>, k.expand[IQ4_XS] = expand<IQ4_XS>;
  k.expand[MXFP4] = expand<MXFP4>, k.expand[NVFP4] = expand<NVFP4>, k.expand[Q1_0] = expand<Q1_0>;
  k.expand[Q2_0] = expand<Q2_0>, k.expand[TQ1_0] = expand<TQ1_0>, k.expand[TQ2_0] = expand<TQ2_0>;
  return k;
}

}  // namespace

const AmxKernels amx_kernels = make_kernels();

}  // namespace mpillama
