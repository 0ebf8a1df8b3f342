// The product of a panel of quantized weights with a block of tokens, for a processor with few vector registers and without
// an instruction that multiplies bytes and adds up in 32 bits. To be included after the Vec of AVX2, and before `kernels_impl.h`.
//
// Codes of a group are unpacked once for all tokens of the block, into the first cache. Then as many tokens as registers
// hold sums of go through them together: each four of their values meet 16 rows.
#pragma once
#include <type_traits>

#include "codec.h"
#include "panel.h"

namespace mpillama {
namespace {

template <int type, int n>
void quantized_panel(const uint16_t* codebook, const uint8_t* unit, size_t n_units, const uint8_t* x, float* const* y, int n_rows) {
  constexpr Format f = format_of(type);
  // vpmaddubsw adds two products of an unsigned and a signed byte in 16 bits: codes above 127 would not fit, so that codes
  // of 8 bits are made signed, and their sign moved over to x.
  constexpr bool wide = f.bits == 8 || f.table != Table::none;
  constexpr int offset = wide ? f.offset - 128 : f.offset;
  constexpr int spans = has_halves(f) ? 2 : 1, span = 8 / spans;
  // Vectors of products that 16 bits can hold the sum of.
  constexpr int held = 32767 / (2 * 127 * largest_code(type)), chain = held >= span ? span : held >= 4 ? 4 : held >= 2 ? 2 : 1;
  constexpr int most = chain > 1 && chain < span ? 2 : 4, together = n < most ? n : most;
  // A single token leaves nothing to share between the parts.
  constexpr int width = n == 1 ? 1 : parts;
  constexpr IntGroup at = int_group(n);
  Vec::Float acc[n][parts];
  for (int i = 0; i < n; i++)
    for (int part = 0; part < parts; part++) acc[i][part] = Vec::all(0.0f);
  for (size_t u = 0; u < n_units; u++, unit += unit_bytes(f)) {
    fetch_ahead(unit, size_t(f.factor_bytes));
    for (int g = 0; g < f.unit / 32; g++, x += int_group_bytes(n)) {
      fetch_ahead(unit + f.factor_bytes + size_t(g) * group_bytes(f), group_bytes(f));
      // Tokens come round for each panel, often from beyond the second cache, and nobody else asks for them in time.
      if (n > 1)
        for (size_t i = 0; i < int_group_bytes(n); i += 64) __builtin_prefetch(x + 2 * int_group_bytes(n) + i);
#pragma GCC unroll 2
      for (int first = 0; first < parts; first += width) {
        using Kept = std::conditional_t<n == 1, Vec::Raw, Vec::Codes<wide>>;
        Kept w[width][8];
        FactorVecs fv[width];
#pragma GCC unroll 2
        for (int part = 0; part < width; part++) {
          Vec::Bytes codes[8];
          unpack<type>(codebook, unit, g, first + part, codes);
#pragma GCC unroll 8
          for (int j = 0; j < 8; j++) w[part][j] = Kept(codes[j]);
          fv[part] = factors<type>(unit, g, first + part);
        }
        for (int t = 0; t < n; t += together) {
          const int8_t* q = reinterpret_cast<const int8_t*>(x) + 32 * t;
#pragma GCC unroll 2
          for (int s = 0; s < spans; s++) {
            Vec::Int sum[together][width];
#pragma GCC unroll 4
            for (int i = 0; i < together; i++)
#pragma GCC unroll 2
              for (int part = 0; part < width; part++) sum[i][part] = Vec::times<0>(0);
#pragma GCC unroll 8
            for (int j = 0; j < span; j += chain) {
              Vec::Bytes pairs[together][width];
#pragma GCC unroll 8
              for (int k = j; k < j + chain; k++) {
                const int column = s * span + k;
#pragma GCC unroll 4
                for (int i = 0; i < together; i++) {
                  const Vec::Bytes four = Vec::four(q + 32 * i + 4 * column);
#pragma GCC unroll 2
                  for (int part = 0; part < width; part++) {
                    const Vec::Bytes product = Vec::products(Vec::Codes<wide>(w[part][column]), four);
                    pairs[i][part] = k == j ? product : Vec::add16(pairs[i][part], product);
                  }
                }
              }
#pragma GCC unroll 4
              for (int i = 0; i < together; i++)
#pragma GCC unroll 2
                for (int part = 0; part < width; part++) sum[i][part] = Vec::add_pairs(sum[i][part], pairs[i][part]);
            }
#pragma GCC unroll 4
            for (int i = 0; i < together; i++) {
              const Vec::Float d = Vec::all(load_float(x + at.d + 4 * (t + i)));
              const uint8_t* negative = spans == 1 ? x + at.sum + 4 * (t + i) : x + at.sums + 8 * (t + i) + 4 * s;
              const uint8_t* dsum = spans == 1 ? x + at.dsum + 4 * (t + i) : x + at.dsums + 8 * (t + i) + 4 * s;
#pragma GCC unroll 2
              for (int part = 0; part < width; part++) {
                Vec::Float& a = acc[t + i][first + part];
                const Vec::Float scale = s ? fv[part].s1 : fv[part].s0;
                const Vec::Int all = offset ? Vec::add(sum[i][part], Vec::times<offset>(load_int(negative))) : sum[i][part];
                Vec::Float v = Vec::fma(Vec::mul(Vec::to_float(all), scale), d, a);
                if constexpr (has_min(f)) v = Vec::fnma(s ? fv[part].m1 : fv[part].m0, Vec::all(load_float(dsum)), v);
                a = v;
              }
            }
          }
        }
      }
    }
  }
  for (int part = 0; part < parts; part++) store_rows(y, n, part, n_rows, [&](int i) { return acc[i][part]; });
}

}  // namespace
}  // namespace mpillama
