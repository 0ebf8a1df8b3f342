// The product of a panel of quantized weights with a block of tokens, where registers hold a group of codes and the sums of all
// tokens. To be included after a `Vec`, and before `kernels_impl.h`.
#pragma once
#include "codec.h"
#include "panel.h"

namespace mpillama {
namespace {

struct SignBits {
  uint8_t values[64] = {};
  constexpr SignBits() { for (uint8_t& value : values) value = 0x80; }
};
constexpr SignBits sign_bits;

template <int type, int n>
void quantized_panel(const uint16_t* codebook, const uint8_t* unit, size_t n_units, const uint8_t* x, float* const* y, int n_rows) {
  constexpr Format f = format_of(type);
  constexpr IntGroup at = int_group(n);
  constexpr int groups = f.unit / 32;
  // Codes of 8 bits, and entries of tables, are unsigned.
  constexpr bool flipped = Vec::signed_bytes && (f.bits == 8 || f.table != Table::none);
  constexpr int offset = flipped ? f.offset - 128 : f.offset;
  Vec::Float acc[parts][n];
  for (int part = 0; part < parts; part++)
    for (int i = 0; i < n; i++) acc[part][i] = Vec::all(0.0f);
  const auto add = [&](const uint8_t* of_unit, const uint8_t* in, int g, int part, Vec::Float* sums) {
    Vec::Bytes w[8];
    unpack<type>(codebook, of_unit, g, part, w);
    if constexpr (flipped)
      for (int j = 0; j < 8; j++) w[j] = Vec::differ(w[j], Vec::load(sign_bits.values));
    const FactorVecs fv = factors<type>(of_unit, g, part);
#pragma GCC unroll 16
    for (int i = 0; i < n; i++) {
      const int8_t* q = reinterpret_cast<const int8_t*>(in) + 32 * i;
      const Vec::Float d = Vec::all(load_float(in + at.d + 4 * i));
      Vec::Float& a = sums[i];
      if constexpr (has_halves(f)) {
        Vec::Int first = Vec::times<offset>(offset ? load_int(in + at.sums + 8 * i) : 0);
        Vec::Int second = Vec::times<offset>(offset ? load_int(in + at.sums + 8 * i + 4) : 0);
        first = Vec::dots<4>(first, w, q);
        second = Vec::dots<4>(second, w + 4, q + 16);
        const Vec::Float v = Vec::mul(Vec::to_float(first), fv.s0);
        a = Vec::fma(Vec::fma(Vec::to_float(second), fv.s1, v), d, a);
        if constexpr (has_min(f)) {
          a = Vec::fnma(fv.m0, Vec::all(load_float(in + at.dsums + 8 * i)), a);
          a = Vec::fnma(fv.m1, Vec::all(load_float(in + at.dsums + 8 * i + 4)), a);
        }
      } else {
        Vec::Int all = Vec::times<offset>(offset ? load_int(in + at.sum + 4 * i) : 0);
        all = Vec::dots<8>(all, w, q);
        a = Vec::fma(Vec::mul(Vec::to_float(all), fv.s0), d, a);
        if constexpr (has_min(f)) a = Vec::fnma(fv.m0, Vec::all(load_float(in + at.dsum + 4 * i)), a);
      }
    }
  };
  for (size_t u = 0; u < n_units; u++, unit += unit_bytes(f), x += groups * int_group_bytes(n)) {
    fetch_ahead(unit, size_t(f.factor_bytes));
    // A token alone is read once for all parts; of several, the sums of one part at a time fit in registers.
    constexpr int together = n == 1 ? parts : 1;
    for (int first = 0; first < parts; first += together) {
      Vec::Float sums[together][n];
      std::memcpy(sums, acc + first, sizeof sums);
      for (int g = 0; g < groups; g++) {
        if (first == 0) fetch_ahead(unit + f.factor_bytes + size_t(g) * group_bytes(f), group_bytes(f));
#pragma GCC unroll 4
        for (int part = 0; part < together; part++) add(unit, x + size_t(g) * int_group_bytes(n), g, first + part, sums[part]);
      }
      std::memcpy(acc + first, sums, sizeof sums);
    }
  }
  for (int part = 0; part < parts; part++) store_rows(y, n, part, n_rows, [&](int i) { return acc[part][i]; });
}

}  // namespace
}  // namespace mpillama
