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
// An unpacked vector has 4 columns of 16 rows: an operand of vpdpbusd. Columns are padded with zeros to whole units.
// Floating-point types are columns of 16 numbers; bf16 in pairs of columns, a pair of a row in 32 bits.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpillama {

// Numbers of enum ggml_type.
enum Type {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11, Q4_K = 12, Q5_K = 13,
  Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, MXFP4 = 39
};

// How the factors of a unit are stored, for 16 rows each.
enum class Factors {
  none,      // floating point
  half,      // S of each group: f16
  half_min,  // S of each group, then M of each group: f16
  super_min, // Q4_K, Q5_K: d and dmin in f16, then 8 bytes sc, 8 bytes mn: S = d sc, M = dmin mn for each group
  super_16,  // Q3_K, Q6_K: d in f16, then 16 signed bytes sc: S = d sc for each half group
  super_32,  // IQ4_XS: d in f16, then 8 signed bytes sc: S = d sc for each group
  nibbles,   // Q2_K: d and dmin in f16, then 16 bytes sc | mn << 4: S = d sc, M = dmin mn for each half group
  exponent,  // MXFP4: a byte e for each group: S = 2^(e - 128)
};

enum class Table { none, iq4, mxfp4 };

struct Format {
  int block, block_bytes;  // of the file
  int bits;                // of a code; 16 or 32: floating point
  int offset;
  Factors factors;
  Table table;             // codes are indices of it; its entries, plus 128, count as codes
  int unit;                // columns
  int factor_bytes;        // of a unit, a multiple of 64
};

constexpr bool is_packed(int type) {
  switch (type) {
    case F32: case F16: case BF16: case Q4_0: case Q4_1: case Q5_0: case Q5_1: case Q8_0: case Q2_K: case Q3_K: case Q4_K:
    case Q5_K: case Q6_K: case IQ4_NL: case IQ4_XS: case MXFP4: return true;
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
    case Q3_K: return {256, 110, 3, 4, Factors::super_16, Table::none, 256, 320};
    case Q4_K: return {256, 144, 4, 0, Factors::super_min, Table::none, 256, 320};
    case Q5_K: return {256, 176, 5, 0, Factors::super_min, Table::none, 256, 320};
    case Q6_K: return {256, 210, 6, 32, Factors::super_16, Table::none, 256, 320};
    case IQ4_NL: return {32, 18, 4, 128, Factors::half, Table::iq4, 64, 64};
    case IQ4_XS: return {256, 136, 4, 128, Factors::super_32, Table::iq4, 256, 192};
    case MXFP4: return {32, 17, 4, 128, Factors::exponent, Table::mxfp4, 128, 64};
    default: return {1, 0, 0, 0, Factors::none, Table::none, 32, 0};
  }
}

constexpr bool is_float(const Format& f) { return f.factors == Factors::none; }
// Whether S belongs to 16 weights rather than 32, and whether there is an M.
constexpr bool has_halves(const Format& f) { return f.factors == Factors::super_16 || f.factors == Factors::nibbles; }
constexpr bool has_min(const Format& f) {
  return f.factors == Factors::half_min || f.factors == Factors::super_min || f.factors == Factors::nibbles;
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
  return table == Table::iq4 ? Entries{{1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241}}
                             : Entries{{128, 129, 130, 131, 132, 134, 136, 140, 128, 127, 126, 125, 124, 122, 120, 116}};
}

}  // namespace mpillama
