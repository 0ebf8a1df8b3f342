// Blocks of GGUF files taken apart into codes and factors; together with blocks_codebook.cpp the only place that knows the
// layouts of the file.
#pragma once
#include <cstdint>
#include <cstring>

#include "formats.h"

namespace mpillama {

// Writes the block of row r (0..15), of a type with a codebook, into a unit that is zero there.
void pack_codebook_block(int type, const uint8_t* block, int r, uint8_t* unit);

namespace {

// The f16 fields are the bits of the file. sc has the factors of each 16 or 32 weights where the type has such, in Q3_K
// with 32 added; for MXFP4 sc[0] is the exponent.
struct Block {
  uint16_t d = 0, dmin = 0;
  uint8_t sc[16], mn[16];
};

inline uint16_t half_at(const uint8_t* p) {
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  return bits;
}

// Eight codes at a time, each in a byte.
constexpr uint64_t each_byte(unsigned value) { return 0x0101010101010101u * value; }

inline uint64_t load8(const uint8_t* p) {
  uint64_t value;
  std::memcpy(&value, p, 8);
  return value;
}

inline void store8(uint8_t* p, uint64_t value) { std::memcpy(p, &value, 8); }

// n bytes: their low halves are the first n codes, their high halves the next n.
inline void nibbles(const uint8_t* p, int n, uint8_t* code) {
  for (int i = 0; i < n; i += 8) {
    const uint64_t both = load8(p + i);
    store8(code + i, both & each_byte(15));
    store8(code + n + i, both >> 4 & each_byte(15));
  }
}

// Bit i of a byte as byte i, 0 or 1.
inline uint64_t spread(uint8_t bits) {
  return (((each_byte(bits) & 0x8040201008040201u) + each_byte(0x7f)) >> 7) & each_byte(1);
}

// 32 bits: bit i is the fifth of code i.
inline void fifth_bits(const uint8_t* p, uint8_t* code) {
  for (int i = 0; i < 4; i++) store8(code + 8 * i, load8(code + 8 * i) | spread(p[i]) << 4);
}

// 64 bytes: of each 32, bits 2i and 2i+1 are the i-th run of 32 codes, to be put at position `at`.
template <int at>
inline void two_bits(const uint8_t* p, uint8_t* code) {
  for (int run = 0; run < 8; run++)
    for (int i = 0; i < 32; i += 8) {
      const uint64_t pairs = (load8(p + run / 4 * 32 + i) >> (2 * (run % 4)) & each_byte(3)) << at;
      store8(code + 32 * run + i, at ? load8(code + 32 * run + i) | pairs : pairs);
    }
}

// 32 bytes: bit i of each is for the i-th run of 32 codes, to be put at position `at`.
template <int at>
inline void one_bit(const uint8_t* p, uint8_t* code) {
  for (int run = 0; run < 8; run++)
    for (int i = 0; i < 32; i += 8)
      store8(code + 32 * run + i, load8(code + 32 * run + i) | (load8(p + i) >> run & each_byte(1)) << at);
}

// n bytes are fractions in base 3, times 256: runs of n codes are their first digits, their second ones and so on.
inline void ternary_digits(const uint8_t* p, int n, int n_digits, uint8_t* code) {
  for (int i = 0; i < n; i++) {
    uint8_t fraction = p[i];
    for (int digit = 0; digit < n_digits; digit++) {
      code[n * digit + i] = uint8_t(fraction * 3 >> 8);
      fraction = uint8_t(fraction * 3);
    }
  }
}

// 6-bit factors of Q4_K and Q5_K: four of each kind in the low bits of 8 bytes; the others have their low halves in the
// next 4 bytes and their upper bits in the top of the first 8.
inline void six_bit_factors(const uint8_t* p, Block& out) {
  for (int i = 0; i < 4; i++) {
    out.sc[i] = p[i] & 63;
    out.mn[i] = p[4 + i] & 63;
    out.sc[4 + i] = uint8_t((p[8 + i] & 15) | p[i] >> 6 << 4);
    out.mn[4 + i] = uint8_t(p[8 + i] >> 4 | p[4 + i] >> 6 << 4);
  }
}

// Takes one block of a quantized type without a codebook apart; its codes go to `code`.
template <int type>
inline void read_block(const uint8_t* p, Block& out, uint8_t* code) {
  switch (type) {
    case Q4_0:
    case IQ4_NL:
      out.d = half_at(p);
      nibbles(p + 2, 16, code);
      break;
    case Q4_1:
      out.d = half_at(p);
      out.dmin = half_at(p + 2) ^ 0x8000;  // the file adds its minimum, M is subtracted
      nibbles(p + 4, 16, code);
      break;
    case Q5_0:
      out.d = half_at(p);
      nibbles(p + 6, 16, code);
      fifth_bits(p + 2, code);
      break;
    case Q5_1:
      out.d = half_at(p);
      out.dmin = half_at(p + 2) ^ 0x8000;
      nibbles(p + 8, 16, code);
      fifth_bits(p + 4, code);
      break;
    case Q8_0:
      out.d = half_at(p);
      for (int i = 0; i < 32; i += 8) store8(code + i, load8(p + 2 + i) ^ each_byte(0x80));
      break;
    case MXFP4:
      out.sc[0] = p[0];
      nibbles(p + 1, 16, code);
      break;
    case Q2_K:
      for (int i = 0; i < 16; i++) {
        out.sc[i] = p[i] & 15;
        out.mn[i] = p[i] >> 4;
      }
      two_bits<0>(p + 16, code);
      out.d = half_at(p + 80);
      out.dmin = half_at(p + 82);
      break;
    case Q3_K:
      two_bits<0>(p + 32, code);
      // A clear bit of the mask means minus 4: with the offset of 4 a set one is worth 4.
      one_bit<2>(p, code);
      for (int i = 0; i < 16; i++) {
        const int low = p[96 + i % 8] >> (i < 8 ? 0 : 4) & 15, high = p[104 + i % 4] >> (2 * (i / 4)) & 3;
        out.sc[i] = uint8_t(low | high << 4);
      }
      out.d = half_at(p + 108);
      break;
    case Q4_K:
      out.d = half_at(p);
      out.dmin = half_at(p + 2);
      six_bit_factors(p + 4, out);
      for (int i = 0; i < 4; i++) nibbles(p + 16 + 32 * i, 32, code + 64 * i);
      break;
    case Q5_K:
      out.d = half_at(p);
      out.dmin = half_at(p + 2);
      six_bit_factors(p + 4, out);
      for (int i = 0; i < 4; i++) nibbles(p + 48 + 32 * i, 32, code + 64 * i);
      one_bit<4>(p + 16, code);
      break;
    case Q6_K:
      for (int i = 0; i < 2; i++) nibbles(p + 64 * i, 64, code + 128 * i);
      two_bits<4>(p + 128, code);
      std::memcpy(out.sc, p + 192, 16);
      out.d = half_at(p + 208);
      break;
    case IQ4_XS:
      out.d = half_at(p);
      for (int i = 0; i < 8; i++) {
        const int low = p[4 + i / 2] >> (4 * (i % 2)) & 15, high = half_at(p + 2) >> (2 * i) & 3;
        out.sc[i] = uint8_t((low | high << 4) - 32);
      }
      for (int i = 0; i < 8; i++) nibbles(p + 8 + 16 * i, 16, code + 32 * i);
      break;
    case NVFP4:
      // The top bit of a factor does not count, and what is not a number counts as zero.
      for (int i = 0; i < 4; i++) out.sc[i] = (p[i] & 127) == 127 ? 0 : p[i] & 127;
      for (int i = 0; i < 4; i++) nibbles(p + 4 + 8 * i, 8, code + 16 * i);
      break;
    case Q1_0:
      out.d = half_at(p);
      for (int i = 0; i < 16; i++) store8(code + 8 * i, spread(p[2 + i]));
      break;
    case Q2_0:
      out.d = half_at(p);
      for (int i = 0; i < 64; i++) code[i] = p[2 + i / 4] >> (2 * (i % 4)) & 3;
      break;
    case TQ1_0:
      ternary_digits(p, 32, 5, code);
      ternary_digits(p + 32, 16, 5, code + 160);
      ternary_digits(p + 48, 4, 4, code + 240);
      out.d = half_at(p + 52);
      break;
    case TQ2_0:
      two_bits<0>(p, code);
      out.d = half_at(p + 64);
      break;
    default: break;
  }
}

}  // namespace
}  // namespace mpillama
