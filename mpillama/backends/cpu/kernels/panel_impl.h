// The product of a panel of quantized weights with a block of tokens, where registers hold a group of codes and the sums of all
// tokens. To be included after a `Vec`, and before `kernels_impl.h`.
#pragma once
#include "codec.h"
#include "panel.h"

namespace mpillama {
namespace {

template <int type, int n>
void quantized_panel(const uint16_t* codebook, const uint8_t* unit, size_t n_units, const uint8_t* x, float* const* y, int n_rows) {
  constexpr Format f = format_of(type);
  constexpr IntGroup at = int_group(n);
  Vec::Float acc[parts][n];
  for (int part = 0; part < parts; part++)
    for (int i = 0; i < n; i++) acc[part][i] = Vec::all(0.0f);
  for (size_t u = 0; u < n_units; u++, unit += unit_bytes(f)) {
    fetch_ahead(unit, size_t(f.factor_bytes));
    for (int g = 0; g < f.unit / 32; g++, x += int_group_bytes(n)) {
      const uint8_t* group = unit + f.factor_bytes + size_t(g) * group_bytes(f);
      fetch_ahead(group, group_bytes(f));
      for (int part = 0; part < parts; part++) {
        Vec::Bytes w[8];
        unpack<type>(codebook, unit, g, part, w);
        const FactorVecs fv = factors<type>(unit, g, part);
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) {
          const int8_t* q = reinterpret_cast<const int8_t*>(x) + 32 * i;
          const Vec::Float d = Vec::all(load_float(x + at.d + 4 * i));
          Vec::Float& a = acc[part][i];
          if constexpr (has_halves(f)) {
            Vec::Int first = Vec::times<f.offset>(load_int(x + at.sums + 8 * i));
            Vec::Int second = Vec::times<f.offset>(load_int(x + at.sums + 8 * i + 4));
            first = Vec::dots<4>(first, w, q);
            second = Vec::dots<4>(second, w + 4, q + 16);
            const Vec::Float v = Vec::mul(Vec::to_float(first), fv.s0);
            a = Vec::fma(Vec::fma(Vec::to_float(second), fv.s1, v), d, a);
            if constexpr (has_min(f)) {
              a = Vec::fnma(fv.m0, Vec::all(load_float(x + at.dsums + 8 * i)), a);
              a = Vec::fnma(fv.m1, Vec::all(load_float(x + at.dsums + 8 * i + 4)), a);
            }
          } else {
            Vec::Int all = Vec::times<f.offset>(load_int(x + at.sum + 4 * i));
            all = Vec::dots<8>(all, w, q);
            a = Vec::fma(Vec::mul(Vec::to_float(all), fv.s0), d, a);
            if constexpr (has_min(f)) a = Vec::fnma(fv.m0, Vec::all(load_float(x + at.dsum + 4 * i)), a);
          }
        }
      }
    }
  }
  for (int part = 0; part < parts; part++) store_rows(y, n, part, n_rows, [&](int i) { return acc[part][i]; });
}

}  // namespace
}  // namespace mpillama
