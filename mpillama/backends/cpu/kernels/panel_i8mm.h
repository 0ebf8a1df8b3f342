// The product of a panel of quantized weights with a block of tokens by instructions that multiply two rows of bytes by two
// tokens. To be included after the Vec of NEON, and before `kernels_impl.h`; single tokens go through `panel_impl.h`.
//
// Tokens lie in pairs (`place_token` in kernels_impl.h). A vector of sums has row 0 with both tokens of a pair, then row 1.
#pragma once
#include "codec.h"
#include "panel.h"
#include "panel_impl.h"

namespace mpillama {
namespace {

// What belongs to the rows of a part, for each token of a pair: of rows 0 and 1, then of 2 and 3.
inline void row_pairs(float32x4_t rows, float32x4_t out[2]) {
  out[0] = vzip1q_f32(rows, rows);
  out[1] = vzip2q_f32(rows, rows);
}

// A number of 32 bits for each token of a pair, for both rows: as a double they are one load.
inline float32x4_t token_floats(const uint8_t* p) {
  double both;
  std::memcpy(&both, p, 8);
  return vreinterpretq_f32_f64(vdupq_n_f64(both));
}

// offset, a power of two or 0, times sums: what codes are too large by, with minus.
template <int offset> inline int32x4_t scaled(int32x4_t sums) {
  if constexpr (offset == 0) return vdupq_n_s32(0);
  else return vshlq_n_s32(sums, __builtin_ctz(unsigned(offset)));
}

template <int type, int n>
void paired_panel(const uint16_t* codebook, const uint8_t* unit, size_t n_units, const uint8_t* x, float* const* y, int n_rows) {
  constexpr Format f = format_of(type);
  constexpr IntGroup at = int_group(n);
  // Two parts, so four pairs of rows, share what is read of the tokens. Their sums are in the first cache.
  constexpr int n_pairs = n / 2, groups = f.unit / 32, rows = 4;
  float32x4_t total[parts / 2][n_pairs][rows] = {};
  for (size_t u = 0; u < n_units; u++, unit += unit_bytes(f), x += groups * int_group_bytes(n)) {
    fetch_ahead(unit, size_t(f.factor_bytes));
    for (int g = 0; g < groups; g++) {
      fetch_ahead(unit + f.factor_bytes + size_t(g) * group_bytes(f), group_bytes(f));
      const uint8_t* in = x + size_t(g) * int_group_bytes(n);
      for (int half = 0; half < parts / 2; half++) {
        Vec::Bytes w[4][rows];
        float32x4_t s0[rows], s1[rows], m0[rows], m1[rows];
#pragma GCC unroll 2
        for (int i = 0; i < 2; i++) {
          const int part = 2 * half + i;
          Vec::Bytes codes[8];
          unpack<type>(codebook, unit, g, part, codes);
          for (int c = 0; c < 4; c++) {
            const uint32x4_t a = vreinterpretq_u32_u8(codes[2 * c]), b = vreinterpretq_u32_u8(codes[2 * c + 1]);
            w[c][2 * i] = vreinterpretq_u8_u32(vzip1q_u32(a, b));
            w[c][2 * i + 1] = vreinterpretq_u8_u32(vzip2q_u32(a, b));
          }
          const FactorVecs fv = factors<type>(unit, g, part);
          row_pairs(fv.s0, s0 + 2 * i);
          if constexpr (has_halves(f)) row_pairs(fv.s1, s1 + 2 * i);
          if constexpr (has_min(f)) row_pairs(fv.m0, m0 + 2 * i);
          if constexpr (has_min(f) && has_halves(f)) row_pairs(fv.m1, m1 + 2 * i);
        }
        // Compilers would take the loads of all pairs together, for which there are not enough registers.
#pragma GCC unroll 1
        for (int p = 0; p < n_pairs; p++) {
          int8x16_t q[4];
          for (int c = 0; c < 4; c++) q[c] = vld1q_s8(reinterpret_cast<const int8_t*>(in) + 64 * p + 16 * c);
          const auto dots = [&](int32x4_t sum, int r, int first, int last) {
            for (int c = first; c < last; c++) sum = vusmmlaq_s32(sum, w[c][r], q[c]);
            return vcvtq_f32_s32(sum);
          };
          const float32x4_t d = token_floats(in + at.d + 8 * p);
          float32x4_t* sums = total[half][p];
          if constexpr (has_halves(f)) {
            const int32x4_t both = vreinterpretq_s32_u8(vld1q_u8(in + at.sums + 16 * p));
            const float32x4_t dsums = Vec::load_float(in + at.dsums + 16 * p);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
              const float32x4_t v = vmulq_f32(dots(scaled<f.offset>(vuzp1q_s32(both, both)), r, 0, 2), s0[r]);
              const float32x4_t second = dots(scaled<f.offset>(vuzp2q_s32(both, both)), r, 2, 4);
              sums[r] = vfmaq_f32(sums[r], vfmaq_f32(v, second, s1[r]), d);
              if constexpr (has_min(f)) {
                sums[r] = vfmsq_f32(sums[r], m0[r], vuzp1q_f32(dsums, dsums));
                sums[r] = vfmsq_f32(sums[r], m1[r], vuzp2q_f32(dsums, dsums));
              }
            }
          } else {
            const int32x4_t both = scaled<f.offset>(vreinterpretq_s32_f32(token_floats(in + at.sum + 8 * p)));
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
              sums[r] = vfmaq_f32(sums[r], vmulq_f32(dots(both, r, 0, 4), s0[r]), d);
              if constexpr (has_min(f)) sums[r] = vfmsq_f32(sums[r], m0[r], token_floats(in + at.dsum + 8 * p));
            }
          }
        }
      }
    }
  }
  for (int part = 0; part < parts; part++)
    store_rows(y, n, part, n_rows, [&](int i) {
      const float32x4_t* pair = total[part / 2][i / 2] + 2 * (part % 2);
      return i % 2 ? vuzp2q_f32(pair[0], pair[1]) : vuzp1q_f32(pair[0], pair[1]);
    });
}

}  // namespace
}  // namespace mpillama
