// Tensor types in packed form: what the kernels must know of them, as constants.
//
// Every packed type is  w = S (code - offset) - M  with an unsigned code of a few bits and factors S and M that groups of
// 16 or 32 weights share. 16 rows make a panel. A panel is a run of units of some columns; a unit is the factors of its 16
// rows, then, for each group of 32 columns, the codes as planes of bits:
//
//   4-bit plane: 4 vectors of 64 bytes; byte 4r+c of vector j has, of row r, column 4j+c in its low half and column
//                16+4j+c in its high half
//   2-bit plane: 2 vectors; bits 2i and 2i+1 of byte 4r+c of vector h: column 4(4h+i)+c
//   1-bit plane: 1 vector; bit j of byte 4r+c: column 4j+c
//   8 bits:      8 vectors; byte 4r+c of vector j: column 4j+c
//
// Codebook types (IQ1, IQ2, IQ3) keep the numbers of the codebook's vectors instead; see `codec_codebook.h`. TQ1_0 keeps
// five digits in a byte: byte 4r+c of a group's vector has those of columns 4j+c, j = 0..4; digit i of the unit's other
// vectors those of the remaining columns, group by group.
//
// An unpacked vector has 4 columns of 16 rows: an operand of products of bytes (vpdpbusd, sdot). Columns are padded with zeros to whole units.
// Floating-point types are columns of 16 numbers; bf16 in pairs of columns, a pair of a row in 32 bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpillama {

// Numbers of enum ggml_type.
enum Type {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13,
  Q6_K = 14, IQ2_XXS = 16, IQ2_XS = 17, IQ3_XXS = 18, IQ1_S = 19, IQ4_NL = 20, IQ3_S = 21, IQ2_S = 22, IQ4_XS = 23,
  IQ1_M = 29, BF16 = 30, TQ1_0 = 34, TQ2_0 = 35, MXFP4 = 39, NVFP4 = 40, Q1_0 = 41, Q2_0 = 42
};

constexpr int n_types = 64;  // larger than all of them

// How the factors of a unit are stored, for 16 rows each.
enum class Factors {
  none,      // floating point
  half,      // S of each block: f16
  half_min,  // S of each group, then M of each group: f16
  super_min, // Q4_K, Q5_K: d and dmin in f16, then 8 bytes sc, 8 bytes mn: S = d sc, M = dmin mn for each group
  super_16,  // Q6_K: d in f16, then 16 signed bytes sc: S = d sc for each half group
  six_16,    // Q3_K: d in f16; a byte for each group has the low halves of both sc, 4 bits of 32 the upper bits; less 32
  super_32,  // IQ4_XS: d in f16, then 8 signed bytes sc: S = d sc for each group
  nibbles,   // Q2_K: d and dmin in f16, then 16 bytes sc | mn << 4: S = d sc, M = dmin mn for each half group
  exponent,  // MXFP4: a byte e for each group: S = 2^(e - 128)
  ue4m3,     // NVFP4: a byte for each half group, E4M3 without sign: S is half of it
  // Codebook types: d in f16, then numbers n of which S = d (2 n + 1) / divisor.
  with_signs,  // IQ2_XXS, IQ3_XXS: of each group, 4 bits among those of the signs
  odd_16,      // IQ2_XS, IQ2_S: a byte for each group has those of its halves
  odd_32,      // IQ3_S: a byte for each pair of groups has both
  with_high,   // IQ1_S: of each group, 3 bits among the upper bits of the codebook's numbers
  words,       // IQ1_M: 4 words for each row, of four half groups 3 bits each, and a quarter of d
};

enum class Table { none, iq4, mxfp4, iq1, iq2, iq3_xxs, iq3_s };

struct Format {
  int block, block_bytes;  // of the file
  int bits;                // of a code; 16 or 32: floating point
  int offset;
  Factors factors;
  Table table;             // codes are indices of it; its entries, plus 128, count as codes
  int unit;                // columns
  int factor_bytes;        // of a unit, a multiple of 64
  int n_vectors = 0;       // of the codebook
};

constexpr bool is_packed(int type) {
  switch (type) {
    case F32: case F16: case BF16: case Q4_0: case Q4_1: case Q5_0: case Q5_1: case Q8_0: case Q2_K: case Q3_K: case Q4_K:
    case Q5_K: case Q6_K: case IQ4_NL: case IQ4_XS: case MXFP4: case NVFP4: case Q1_0: case Q2_0: case TQ1_0: case TQ2_0:
    case IQ1_S: case IQ1_M: case IQ2_XXS: case IQ2_XS: case IQ2_S: case IQ3_XXS: case IQ3_S: return true;
    default: return false;
  }
}

constexpr Format format_of(int type) {
  switch (type) {
    case F32: return {1, 4, 32, 0, Factors::none, Table::none, 32, 0};
    case F16: return {1, 2, 16, 0, Factors::none, Table::none, 32, 0};
    case BF16: return {1, 2, 16, 0, Factors::none, Table::none, 32, 0};
    case Q4_0: return {32, 18, 4, 8, Factors::half, Table::none, 64, 64};
    case Q4_1: return {32, 20, 4, 0, Factors::half_min, Table::none, 64, 128};
    case Q5_0: return {32, 22, 5, 16, Factors::half, Table::none, 64, 64};
    case Q5_1: return {32, 24, 5, 0, Factors::half_min, Table::none, 64, 128};
    case Q8_0: return {32, 34, 8, 128, Factors::half, Table::none, 64, 64};
    case Q2_K: return {256, 84, 2, 0, Factors::nibbles, Table::none, 256, 320};
    case Q3_K: return {256, 110, 3, 4, Factors::six_16, Table::none, 256, 256};
    case Q4_K: return {256, 144, 4, 0, Factors::super_min, Table::none, 256, 320};
    case Q5_K: return {256, 176, 5, 0, Factors::super_min, Table::none, 256, 320};
    case Q6_K: return {256, 210, 6, 32, Factors::super_16, Table::none, 256, 320};
    case IQ4_NL: return {32, 18, 4, 128, Factors::half, Table::iq4, 64, 64};
    case IQ4_XS: return {256, 136, 4, 128, Factors::super_32, Table::iq4, 256, 192};
    case MXFP4: return {32, 17, 4, 128, Factors::exponent, Table::mxfp4, 128, 64};
    case NVFP4: return {64, 36, 4, 128, Factors::ue4m3, Table::mxfp4, 64, 64};
    // A bit counts 0 or 2.
    case Q1_0: return {128, 18, 1, 1, Factors::half, Table::none, 256, 64};
    case Q2_0: return {64, 18, 2, 1, Factors::half, Table::none, 128, 64};
    case TQ1_0: return {256, 54, 1, 1, Factors::half, Table::none, 256, 64 + 320};
    case TQ2_0: return {256, 66, 2, 1, Factors::half, Table::none, 256, 64};
    case IQ1_S: return {256, 50, 1, 128, Factors::with_high, Table::iq1, 256, 64 + 256, 2048};
    case IQ1_M: return {256, 56, 1, 128, Factors::words, Table::iq1, 256, 128 + 256, 2048};
    case IQ2_XXS: return {256, 66, 2, 128, Factors::with_signs, Table::iq2, 256, 64, 256};
    case IQ2_XS: return {256, 74, 2, 128, Factors::odd_16, Table::iq2, 256, 192, 512};
    case IQ2_S: return {256, 82, 2, 128, Factors::odd_16, Table::iq2, 256, 192 + 128, 1024};
    case IQ3_XXS: return {256, 98, 3, 128, Factors::with_signs, Table::iq3_xxs, 256, 64, 256};
    case IQ3_S: return {256, 110, 3, 128, Factors::odd_32, Table::iq3_s, 256, 128 + 128, 512};
    default: return {1, 0, 0, 0, Factors::none, Table::none, 32, 0};
  }
}

constexpr bool is_float(const Format& f) { return f.factors == Factors::none; }
// Whether S belongs to 16 weights rather than 32, and whether there is an M.
constexpr bool has_halves(const Format& f) {
  switch (f.factors) {
    case Factors::super_16: case Factors::six_16: case Factors::nibbles: case Factors::ue4m3: case Factors::odd_16:
    case Factors::words: return true;
    default: return false;
  }
}
constexpr bool has_min(const Format& f) {
  return f.factors == Factors::half_min || f.factors == Factors::super_min || f.factors == Factors::nibbles;
}


// The columns of codebook types are in an order of their own within each 16: at 4i+c is column 8(c/2) + 2i + c%2. Vectors
// of 8 weights come out of the codebook as 2 bytes, and two of them make 4 columns of a row.
constexpr bool is_permuted(const Format& f) { return f.n_vectors != 0; }
constexpr int column_at(const Format& f, int place) {
  const int i = place % 16 / 4, c = place % 4;
  return is_permuted(f) ? place / 16 * 16 + c / 2 * 8 + 2 * i + c % 2 : place;
}

constexpr size_t group_bytes(const Format& f) { return size_t(f.bits) * 64; }
constexpr size_t unit_bytes(const Format& f) { return size_t(f.factor_bytes) + group_bytes(f) * size_t(f.unit / 32); }
constexpr size_t units(const Format& f, size_t n_in) { return (n_in + size_t(f.unit) - 1) / size_t(f.unit); }
constexpr size_t panel_bytes(const Format& f, size_t n_in) { return units(f, n_in) * unit_bytes(f); }
constexpr size_t file_row_bytes(const Format& f, size_t n_in) { return n_in / size_t(f.block) * size_t(f.block_bytes); }

// Entries plus 128, so that they are unsigned.
struct Entries {
  uint8_t values[16];
};
constexpr Entries entries(Table table) {
  switch (table) {
    case Table::iq4: return {{1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}};
    case Table::mxfp4: return {{128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116}};
    // Eight times -1, 0 or 1, and one more or, from 4 on, less.
    case Table::iq1: return {{121, 129, 137, 0, 119, 127, 135, 0, 0, 0, 0, 0, 0, 0, 0, 0}};
    // The last half of those that are used: negative ones.
    case Table::iq2: return {{136, 153, 171, 0, 120, 103, 85, 0, 0, 0, 0, 0, 0, 0, 0, 0}};
    case Table::iq3_xxs: return {{132, 140, 148, 156, 164, 172, 180, 190, 124, 116, 108, 100, 92, 84, 76, 66}};
    case Table::iq3_s: return {{129, 131, 133, 135, 137, 139, 141, 143, 127, 125, 123, 121, 119, 117, 115, 113}};
    case Table::none: break;
  }
  return {};
}

// The largest code; of codes of 8 bits and of entries the largest size, once 128 is taken from them.
constexpr int largest_code(int type) {
  const Format f = format_of(type);
  if (f.table != Table::none) {
    int largest = 0;
    for (int entry : entries(f.table).values) {
      const int size = entry < 128 ? 128 - entry : entry - 128;
      if (entry && size > largest) largest = size;
    }
    return largest;
  }
  // A single bit stands for 2, and digits are up to 2.
  return f.bits == 8 ? 128 : f.bits == 1 ? 2 : (1 << f.bits) - 1;
}

}  // namespace mpillama
