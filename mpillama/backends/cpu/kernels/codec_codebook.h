// Codes and factors of codebook types (IQ1, IQ2, IQ3), and of TQ1_0, for whichever `Vec` was included before.
//
// A group of 32 columns has, for each row, the numbers of vectors of 8 weights (4 in IQ3) in the codebook, whose entries
// have a field of 2 bits (4 in IQ3) for each weight: field i of byte c, columns 2i + c. Words of 16 bits, two for each row:
//
//   IQ1, IQ2: one vector; low word: the lower 8 bits of the numbers of columns 0..7 and 16..23; high word: 8..15, 24..31
//   IQ3:      two vectors, one for each 16 columns; low word: of columns 0..3 and 4..7; high word: 8..11, 12..15
//
// Upper bits of these numbers are words in the unit's head, and in IQ2_XS among the signs. IQ2 and IQ3 have then a 1-bit
// plane of signs. Where these are even in number for each 8 columns, that of the last is not kept, but other bits are in
// its place: bits 11, 15, 27 and 31 of the lane.
#pragma once
#include "formats.h"

namespace mpillama {
namespace {

constexpr bool has_even_signs(int type) { return type == IQ2_XXS || type == IQ2_XS || type == IQ3_XXS; }

// Where the upper bits of the numbers begin in a unit.
constexpr int high_at(int type) {
  switch (type) {
    case IQ1_S: return 64;
    case IQ2_S: return 192;
    case IQ1_M: case IQ3_S: return 128;
    default: return 0;
  }
}

template <int type>
inline Vec::Bytes signs(const uint8_t* group, int part) {
  constexpr Format f = format_of(type);
  Vec::Bytes z = Vec::load(group + 64 * (f.bits - 1) + 4 * Vec::lanes * part);
  if constexpr (has_even_signs(type)) {
    z = Vec::right32(z, 0, 0x77ff77ff);
    Vec::Bytes odd = Vec::differ(z, Vec::right16(z, 8, 0xff));
    odd = Vec::differ(odd, Vec::right16(odd, 2, 0xff));
    odd = Vec::differ(odd, Vec::right16(odd, 1, 0xff));
    z = Vec::either(z, Vec::left16<11>(Vec::right16(odd, 0, 0x11)));
  }
  return z;
}

template <int type>
inline void unpack_codebook(const uint16_t* codebook, const uint8_t* unit, int g, int part, Vec::Bytes w[8]) {
  constexpr Format f = format_of(type);
  const uint8_t* group = unit + f.factor_bytes + size_t(g) * group_bytes(f);
  const uint8_t *q = group + 4 * Vec::lanes * part, *high = unit + high_at(type) + 4 * Vec::lanes * part;
  if constexpr (f.bits == 3) {
    for (int k = 0; k < 4; k++) {
      Vec::Bytes index = Vec::right16(Vec::load(q + 64 * (k / 2)), 8 * (k % 2), 0xff);
      if constexpr (type == IQ3_S) {
        const Vec::Bytes bit = Vec::right16(Vec::load(high + 64 * (g / 4)), 4 * (g % 4) + k, 1);
        index = Vec::either(index, Vec::left16<8>(bit));
      }
      const Vec::Bytes entry = Vec::lookup_words<f.n_vectors>(codebook, index);
      w[2 * k] = Vec::right<0, 15>(entry);
      w[2 * k + 1] = Vec::right<4, 15>(entry);
    }
    return;
  }
  for (int h = 0; h < 2; h++) {
    Vec::Bytes index = Vec::right16(Vec::load(q), 8 * h, 0xff);
    if constexpr (type == IQ1_S) {
      index = Vec::either(index, Vec::left16<8>(Vec::right16(Vec::load(high + 64 * (g / 2)), 8 * (g % 2) + 3 * h, 7)));
    } else if constexpr (type == IQ1_M) {
      index = Vec::either(index, Vec::left16<8>(Vec::right16(Vec::load(high + 64 * (g / 2)), 8 * (g % 2) + 4 * h, 7)));
    } else if constexpr (type == IQ2_S) {
      index = Vec::either(index, Vec::left16<8>(Vec::right16(Vec::load(high + 64 * (g / 4)), 4 * (g % 4) + 2 * h, 3)));
    } else if constexpr (type == IQ2_XS) {
      index = Vec::either(index, Vec::left16<8>(Vec::right16(Vec::load(q + 64), 11 + 4 * h, 1)));
    }
    const Vec::Bytes entry = Vec::lookup_words<f.n_vectors>(codebook, index);
    w[4 * h] = Vec::right<0, 3>(entry);
    w[4 * h + 1] = Vec::right<2, 3>(entry);
    w[4 * h + 2] = Vec::right<4, 3>(entry);
    w[4 * h + 3] = Vec::right<6, 3>(entry);
    if constexpr (f.bits == 1) {
      // One more or less for all columns: bit 2 of their codes.
      const Vec::Bytes words = Vec::load(high + 64 * (g / 2));
      Vec::Bytes less;
      if constexpr (type == IQ1_S) {
        less = Vec::right32(words, 16 + 8 * (g % 2) + 7, 1);
        less = Vec::either(less, Vec::left32<16>(less));
      } else {
        less = Vec::right16(words, 8 * (g % 2) + 4 * h + 3, 1);
      }
      less = Vec::either(Vec::left16<2>(less), Vec::left16<10>(less));
      for (int i = 0; i < 4; i++) w[4 * h + i] = Vec::either(w[4 * h + i], less);
    }
  }
}

// Five digits of base 3 in a byte, as a fraction: times 3, its integer part is the next digit.
template <int type>
inline void unpack_ternary(const uint8_t* unit, int g, int part, Vec::Bytes w[8]) {
  constexpr Format f = format_of(type);
  constexpr int powers[5] = {1, 3, 9, 27, 81};
  const uint8_t* first = unit + 4 * Vec::lanes * part;
  Vec::Bytes z = Vec::load(first + f.factor_bytes + size_t(g) * group_bytes(f));
  for (int j = 0; j < 5; j++) {
    w[j] = Vec::third(z);
    if (j < 4) z = Vec::times8(z, 3);
  }
  for (int j = 0; j < 3; j++) {
    const int at = 3 * g + j;
    w[5 + j] = Vec::third(Vec::times8(Vec::load(first + 64 + 64 * (at / 5)), powers[at % 5]));
  }
}

// S of columns 0..15 and, where it is another, of 16..31.
template <int type>
inline void codebook_factors(const uint8_t* unit, int g, int part, Vec::Float& s0, Vec::Float& s1) {
  constexpr Format f = format_of(type);
  constexpr float unit_of = type == IQ3_S ? 1.0f : type == IQ3_XXS ? 0.25f : 0.125f;
  const uint8_t *halves = unit + 2 * Vec::lanes * part, *bytes = unit + Vec::lanes * part;
  Vec::Float d;
  const auto odd = [&](Vec::Float n) {
    const Vec::Float factor = Vec::mul(d, Vec::all(unit_of));
    return Vec::fma(Vec::add(n, n), factor, factor);
  };
  if constexpr (f.factors == Factors::words) {
    const auto words = [&](int k) { return Vec::widen16(halves + 32 * k); };
    const auto quarter = [&](int k) { return Vec::right32(words(k), 12, 15); };
    d = Vec::half_lanes_to_float(Vec::either(Vec::either(quarter(0), Vec::left32<4>(quarter(1))),
                                             Vec::either(Vec::left32<8>(quarter(2)), Vec::left32<12>(quarter(3)))));
    s0 = odd(Vec::lanes_to_float(Vec::right32(words(g / 2), 6 * (g % 2), 7)));
    s1 = odd(Vec::lanes_to_float(Vec::right32(words(g / 2), 6 * (g % 2) + 3, 7)));
    return;
  }
  d = Vec::load_half(halves);
  if constexpr (f.factors == Factors::with_signs) {
    Vec::Bytes n = Vec::load(unit + f.factor_bytes + size_t(g) * group_bytes(f) + 64 * (f.bits - 1) + 4 * Vec::lanes * part);
    n = Vec::right32(n, 11, 0x00110011);
    n = Vec::right32(Vec::either(n, Vec::right32(n, 3, 0x00020002)), 0, 0x00030003);
    s0 = odd(Vec::lanes_to_float(Vec::right32(Vec::either(n, Vec::right32(n, 14, 12)), 0, 15)));
  } else if constexpr (f.factors == Factors::with_high) {
    const Vec::Bytes n = Vec::right32(Vec::load(unit + 64 + 64 * (g / 2) + 4 * Vec::lanes * part), 8 * (g % 2) + 6, 0x00010003);
    s0 = odd(Vec::lanes_to_float(Vec::right32(Vec::either(n, Vec::right32(n, 14, 4)), 0, 7)));
  } else if constexpr (f.factors == Factors::odd_16) {
    s0 = odd(Vec::load_nibble<0>(bytes + 64 + 16 * g));
    s1 = odd(Vec::load_nibble<4>(bytes + 64 + 16 * g));
  } else {
    const uint8_t* both = bytes + 64 + 16 * (g / 2);
    s0 = odd(g % 2 ? Vec::load_nibble<4>(both) : Vec::load_nibble<0>(both));
  }
}

}  // namespace
}  // namespace mpillama
