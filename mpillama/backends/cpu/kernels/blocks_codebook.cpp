// Blocks of the IQ types, packed as `codec_codebook.h` says.
#include <cstring>

#include "blocks.h"

namespace mpillama {
namespace {

uint32_t word16(const uint8_t* p) { return uint32_t(p[0] | p[1] << 8); }
uint32_t word32(const uint8_t* p) { return word16(p) | word16(p + 2) << 16; }

// Bits 0, 2, 4 and 6.
uint32_t even_bits(uint32_t s) { return (s & 1) | (s >> 1 & 2) | (s >> 2 & 4) | (s >> 3 & 8); }

// Signs of 32 columns, a byte for each 8, as a row's word of the plane.
uint32_t sign_word(const uint32_t signs[4]) {
  uint32_t word = 0;
  for (int l = 0; l < 4; l++) {
    const uint32_t both = even_bits(signs[l]) | even_bits(signs[l] >> 1) << 8;
    word |= both << (16 * (l % 2) + 4 * (l / 2));
  }
  return word;
}

// A field of `width` bits for each of the four vectors of 8 columns: those of 0 and 2 in the low word, of 1 and 3 in the high.
uint32_t in_words(const uint32_t fields[4], int width) {
  return (fields[0] | fields[2] << width) | (fields[1] | fields[3] << width) << 16;
}

// One row of one unit.
struct Row {
  const Format f;
  const int r;
  uint8_t* const unit;

  void put16(int at, uint32_t word) const {
    const uint16_t bits = uint16_t(word);
    std::memcpy(unit + at + 2 * r, &bits, 2);
  }
  void put32(size_t at, uint32_t word) const { std::memcpy(unit + at + size_t(4 * r), &word, 4); }
  void or32(size_t at, uint32_t word) const {
    uint32_t old;
    std::memcpy(&old, unit + at + 4 * r, 4);
    put32(at, old | word);
  }
  size_t group(int g) const { return size_t(f.factor_bytes) + size_t(g) * group_bytes(f); }
  // Numbers of four vectors of 8 weights, or of eight of 4.
  void numbers_of_8(int g, const uint32_t index[4]) const {
    const uint32_t low[4] = {index[0] & 255, index[1] & 255, index[2] & 255, index[3] & 255};
    put32(group(g), in_words(low, 8));
  }
  void numbers_of_4(int g, const uint8_t* index) const {
    put32(group(g), word32(index));
    put32(group(g) + 64, word32(index + 4));
  }
  void signs(int g, const uint32_t s[4]) const { put32(group(g) + 64 * size_t(f.bits - 1), sign_word(s)); }
  // 7 bits each, and 4 other bits.
  void even_signs(int g, const uint32_t s[4], const uint32_t other[4]) const {
    const uint32_t all[4] = {s[0] | other[0] << 7, s[1] | other[1] << 7, s[2] | other[2] << 7, s[3] | other[3] << 7};
    signs(g, all);
  }
  // A word of the file: 4 times 7 bits, and a factor of 4 bits.
  void even_signs(int g, uint32_t word) const {
    const uint32_t s[4] = {word & 127, word >> 7 & 127, word >> 14 & 127, word >> 21 & 127};
    const uint32_t factor[4] = {word >> 28 & 1, word >> 30 & 1, word >> 29 & 1, word >> 31};
    even_signs(g, s, factor);
  }
};

}  // namespace

void pack_codebook_block(int type, const uint8_t* p, int r, uint8_t* unit) {
  const Row row{format_of(type), r, unit};
  uint32_t index[4], signs[4], high[4];
  if (type != IQ1_M) row.put16(0, word16(p));
  for (int g = 0; g < 8; g++) {
    switch (type) {
      case IQ1_S: {
        const uint32_t word = word16(p + 34 + 2 * g);
        for (int l = 0; l < 4; l++) index[l] = p[2 + 4 * g + l], high[l] = word >> (3 * l) & 7;
        const uint32_t factor = (word >> 12 & 3) << 6 | (word >> 14) << 22;
        row.or32(size_t(64 + 64 * (g / 2)), (in_words(high, 3) | factor) << (8 * (g % 2)));
        row.numbers_of_8(g, index);
        break;
      }
      case IQ1_M:
        for (int l = 0; l < 4; l++) index[l] = p[4 * g + l], high[l] = p[32 + 2 * g + l / 2] >> (4 * (l % 2)) & 15;
        row.or32(size_t(128 + 64 * (g / 2)), in_words(high, 4) << (8 * (g % 2)));
        row.numbers_of_8(g, index);
        if (g < 4) row.put16(32 * g, word16(p + 48 + 2 * g));
        break;
      case IQ2_XXS:
        for (int l = 0; l < 4; l++) index[l] = p[2 + 8 * g + l];
        row.numbers_of_8(g, index);
        row.even_signs(g, word32(p + 2 + 8 * g + 4));
        break;
      case IQ2_XS:
        for (int l = 0; l < 4; l++) {
          index[l] = word16(p + 2 + 8 * g + 2 * l);
          signs[l] = index[l] >> 9, high[l] = index[l] >> 8 & 1;
        }
        row.numbers_of_8(g, index);
        row.even_signs(g, signs, high);
        unit[64 + 16 * g + r] = p[66 + g];
        break;
      case IQ2_S:
        for (int l = 0; l < 4; l++)
          index[l] = p[2 + 4 * g + l], signs[l] = p[34 + 4 * g + l], high[l] = p[66 + g] >> (2 * l) & 3;
        row.numbers_of_8(g, index);
        row.signs(g, signs);
        row.or32(size_t(192 + 64 * (g / 4)), in_words(high, 2) << (4 * (g % 4)));
        unit[64 + 16 * g + r] = p[74 + g];
        break;
      case IQ3_XXS:
        row.numbers_of_4(g, p + 2 + 8 * g);
        row.even_signs(g, word32(p + 66 + 4 * g));
        break;
      case IQ3_S: {
        row.numbers_of_4(g, p + 2 + 8 * g);
        for (int l = 0; l < 4; l++) signs[l] = p[74 + 4 * g + l];
        row.signs(g, signs);
        // Of vectors 0, 1, 4 and 5 in the low word, of 2, 3, 6 and 7 in the high one.
        const uint32_t bits = p[66 + g];
        const uint32_t word = (bits & 3) | (bits >> 4 & 3) << 2 | (bits >> 2 & 3) << 16 | (bits >> 6) << 18;
        row.or32(size_t(128 + 64 * (g / 4)), word << (4 * (g % 4)));
        if (g < 4) unit[64 + 16 * g + r] = p[106 + g];
        break;
      }
      default: break;
    }
  }
}

}  // namespace mpillama
