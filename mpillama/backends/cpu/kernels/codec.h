// Codes and factors of a group of 32 columns as vectors, for whichever `Vec` was included before.
//
// `part` counts the vectors that make up 16 rows: always 0 for vectors of 16 lanes, 0 or 1 for those of 8, 0 to 3 for those of 4.
#pragma once
#include "codec_codebook.h"
#include "formats.h"

namespace mpillama {
namespace {

// Bit j of a byte of z becomes bit `top` of a byte of w[j].
template <int top>
inline void merge_bits(Vec::Bytes z, Vec::Bytes w[8]) {
  constexpr int mask = 1 << top;
  w[0] = Vec::merge<top, mask>(w[0], z);
  w[1] = Vec::merge<top - 1, mask>(w[1], z);
  w[2] = Vec::merge<top - 2, mask>(w[2], z);
  w[3] = Vec::merge<top - 3, mask>(w[3], z);
  w[4] = Vec::merge<top - 4, mask>(w[4], z);
  w[5] = Vec::merge<top - 5, mask>(w[5], z);
  w[6] = Vec::merge<top - 6, mask>(w[6], z);
  w[7] = Vec::merge<top - 7, mask>(w[7], z);
}

// w[j]: places 4j..4j+3 of each row, as unsigned codes.
template <int type>
inline void unpack(const uint16_t* codebook, const uint8_t* unit, int g, int part, Vec::Bytes w[8]) {
  constexpr Format f = format_of(type);
  const uint8_t* group = unit + f.factor_bytes + size_t(g) * group_bytes(f);
  const uint8_t* q = group + 4 * Vec::lanes * part;
  if constexpr (is_permuted(f)) {
    unpack_codebook<type>(codebook, unit, g, part, w);
    if constexpr (f.bits > 1) merge_bits<f.bits>(signs<type>(group, part), w);
  } else if constexpr (type == TQ1_0) {
    unpack_ternary<type>(unit, g, part, w);
  } else if constexpr (f.bits == 1) {
    const Vec::Bytes z = Vec::load(q);
    for (int j = 0; j < 8; j++) w[j] = Vec::right<0, 0>(z);
    merge_bits<1>(z, w);
  } else if constexpr (f.bits == 8) {
    for (int j = 0; j < 8; j++) w[j] = Vec::load(q + 64 * j);
  } else if constexpr (f.bits >= 4) {
    for (int j = 0; j < 4; j++) {
      const Vec::Bytes z = Vec::load(q + 64 * j);
      w[j] = Vec::right<0, 15>(z);
      w[j + 4] = Vec::right<4, 15>(z);
    }
  } else {
    for (int h = 0; h < 2; h++) {
      const Vec::Bytes z = Vec::load(q + 64 * h);
      w[4 * h] = Vec::right<0, 3>(z);
      w[4 * h + 1] = Vec::right<2, 3>(z);
      w[4 * h + 2] = Vec::right<4, 3>(z);
      w[4 * h + 3] = Vec::right<6, 3>(z);
    }
  }
  if constexpr (f.bits == 6) {
    for (int h = 0; h < 2; h++) {
      const Vec::Bytes z = Vec::load(q + 256 + 64 * h);
      w[4 * h] = Vec::merge<4, 0x30>(w[4 * h], z);
      w[4 * h + 1] = Vec::merge<2, 0x30>(w[4 * h + 1], z);
      w[4 * h + 2] = Vec::merge<0, 0x30>(w[4 * h + 2], z);
      w[4 * h + 3] = Vec::merge<-2, 0x30>(w[4 * h + 3], z);
    }
  } else if constexpr (!is_permuted(f) && (f.bits == 5 || f.bits == 3)) {
    merge_bits<f.bits - 1>(Vec::load(q + 64 * (f.bits - 1)), w);
  }
  if constexpr (f.table != Table::none) {
    constexpr Entries table = entries(f.table);
    for (int j = 0; j < 8; j++) w[j] = Vec::lookup(table.values, w[j]);
  }
}

// S of the columns 0..15 and 16..31, and M likewise; those that a type does not have are left alone.
struct FactorVecs {
  Vec::Float s0, s1, m0, m1;
};

template <int type>
inline FactorVecs factors(const uint8_t* unit, int group, int part) {
  constexpr Format f = format_of(type);
  const uint8_t *halves = unit + 2 * Vec::lanes * part, *bytes = unit + Vec::lanes * part;
  FactorVecs r;
  if constexpr (f.factors == Factors::half || f.factors == Factors::half_min) {
    r.s0 = Vec::load_half(halves + 32 * (32 * group / f.block));
    if constexpr (f.factors == Factors::half_min) r.m0 = Vec::load_half(halves + 64 + 32 * group);
  } else if constexpr (f.factors == Factors::super_min) {
    r.s0 = Vec::mul(Vec::load_half(halves), Vec::load_u8(bytes + 64 + 16 * group));
    r.m0 = Vec::mul(Vec::load_half(halves + 32), Vec::load_u8(bytes + 192 + 16 * group));
  } else if constexpr (f.factors == Factors::super_16) {
    const Vec::Float d = Vec::load_half(halves);
    r.s0 = Vec::mul(d, Vec::load_i8(bytes + 32 + 32 * group));
    r.s1 = Vec::mul(d, Vec::load_i8(bytes + 48 + 32 * group));
  } else if constexpr (f.factors == Factors::six_16) {
    const Vec::Float d = Vec::load_half(halves), less = Vec::mul(d, Vec::all(-32.0f));
    const Vec::Bytes low = Vec::widen8(bytes + 32 + 16 * group), high = Vec::load(unit + 192 + 4 * Vec::lanes * part);
    const auto factor = [&](int half) {
      const Vec::Bytes upper = Vec::left32<4>(Vec::right32(high, 4 * group + 2 * half, 3));
      return Vec::fma(Vec::lanes_to_float(Vec::either(Vec::right32(low, 4 * half, 15), upper)), d, less);
    };
    r.s0 = factor(0);
    r.s1 = factor(1);
  } else if constexpr (f.factors == Factors::ue4m3) {
    r.s0 = Vec::load_ue4m3(bytes + 32 * group);
    r.s1 = Vec::load_ue4m3(bytes + 32 * group + 16);
  } else if constexpr (is_permuted(f)) {
    codebook_factors<type>(unit, group, part, r.s0, r.s1);
  } else if constexpr (f.factors == Factors::super_32) {
    r.s0 = Vec::mul(Vec::load_half(halves), Vec::load_i8(bytes + 32 + 16 * group));
  } else if constexpr (f.factors == Factors::nibbles) {
    const Vec::Float d = Vec::load_half(halves), dmin = Vec::load_half(halves + 32);
    const uint8_t* both = bytes + 64 + 32 * group;
    r.s0 = Vec::mul(d, Vec::load_nibble<0>(both));
    r.s1 = Vec::mul(d, Vec::load_nibble<0>(both + 16));
    r.m0 = Vec::mul(dmin, Vec::load_nibble<4>(both));
    r.m1 = Vec::mul(dmin, Vec::load_nibble<4>(both + 16));
  } else if constexpr (f.factors == Factors::exponent) {
    r.s0 = Vec::load_exponent(bytes + 16 * group);
  }
  return r;
}

}  // namespace
}  // namespace mpillama
