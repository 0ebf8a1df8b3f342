// Rows of a file's blocks become panels. Plain C++ for compilers to make the best of with each instruction set.
#pragma once
#include <cstring>

#include "blocks.h"
#include "pack.h"

namespace mpillama {
namespace {

// The factors of one block of row r, whose first column is `column`; unit is where its unit begins.
template <int type>
inline void write_factors(const Block& block, size_t column, int r, uint8_t* unit) {
  constexpr Format f = format_of(type);
  const size_t at = column % size_t(f.unit), group = at / 32;
  const auto put_half = [&](size_t offset, uint16_t bits) { std::memcpy(unit + offset + 2 * r, &bits, 2); };
  switch (f.factors) {
    case Factors::half: put_half(32 * (at / size_t(f.block)), block.d); break;
    case Factors::half_min:
      put_half(32 * group, block.d);
      put_half(64 + 32 * group, block.dmin);
      break;
    case Factors::super_min:
      put_half(0, block.d);
      put_half(32, block.dmin);
      for (int i = 0; i < 8; i++) {
        unit[64 + 16 * i + r] = block.sc[i];
        unit[192 + 16 * i + r] = block.mn[i];
      }
      break;
    case Factors::super_16:
      put_half(0, block.d);
      for (int i = 0; i < 16; i++) unit[32 + 16 * i + r] = block.sc[i];
      break;
    case Factors::six_16: {
      put_half(0, block.d);
      uint32_t upper = 0;
      for (int i = 0; i < 8; i++) {
        const uint8_t a = block.sc[2 * i], b = block.sc[2 * i + 1];
        unit[32 + 16 * i + r] = uint8_t((a & 15) | b << 4);
        upper |= uint32_t(a >> 4 | b >> 4 << 2) << (4 * i);
      }
      std::memcpy(unit + 192 + 4 * r, &upper, 4);
      break;
    }
    case Factors::super_32:
      put_half(0, block.d);
      for (int i = 0; i < 8; i++) unit[32 + 16 * i + r] = block.sc[i];
      break;
    case Factors::nibbles:
      put_half(0, block.d);
      put_half(32, block.dmin);
      for (int i = 0; i < 16; i++) unit[64 + 16 * i + r] = uint8_t(block.sc[i] | block.mn[i] << 4);
      break;
    case Factors::exponent: unit[16 * group + size_t(r)] = block.sc[0]; break;
    case Factors::ue4m3:
      for (int i = 0; i < 4; i++) unit[16 * i + r] = block.sc[i];
      break;
    default: break;
  }
}

// A group's codes, those of each row together, as vectors of 4 columns of 16 rows; eight codes at a time from then on.
struct Group {
  uint64_t v[8][8];

  void fill(const uint8_t* code, size_t stride) {
    for (int r = 0; r < 16; r++)
      for (int j = 0; j < 8; j++)
        std::memcpy(reinterpret_cast<uint8_t*>(v[j]) + 4 * r, code + size_t(r) * stride + 4 * j, 4);
  }
};

template <int bits>
inline void write_codes(const Group& g, uint8_t* out) {
  const auto put = [&](int plane, int i, uint64_t value) { std::memcpy(out + plane + 8 * i, &value, 8); };
  // Bits [from, from + n) of vector j, at position `to`.
  const auto some = [&](int j, int i, int from, int n, int to) {
    return (g.v[j][i] >> from & each_byte((1u << n) - 1)) << to;
  };
  if (bits == 8) {
    std::memcpy(out, g.v, 512);
  } else if (bits >= 4) {
    for (int j = 0; j < 4; j++)
      for (int i = 0; i < 8; i++) put(64 * j, i, some(j, i, 0, 4, 0) | some(j + 4, i, 0, 4, 4));
  }
  if (bits == 6 || bits == 2 || bits == 3) {
    const int from = bits == 6 ? 4 : 0, plane = bits == 6 ? 256 : 0;
    for (int h = 0; h < 2; h++)
      for (int i = 0; i < 8; i++)
        put(plane + 64 * h, i, some(4 * h, i, from, 2, 0) | some(4 * h + 1, i, from, 2, 2) | some(4 * h + 2, i, from, 2, 4) |
                                   some(4 * h + 3, i, from, 2, 6));
  }
  if (bits % 2 && bits < 6) {
    for (int i = 0; i < 8; i++) {
      uint64_t all = 0;
      for (int j = 0; j < 8; j++) all |= some(j, i, bits - 1, 1, j);
      put(64 * (bits - 1), i, all);
    }
  }
}

// Five digits of base 3 as a fraction of a byte, rounded up: the product with a power of 3 begins with a later digit.
uint8_t ternary(const uint8_t* digits) {
  int number = 0;
  for (int i = 0; i < 5; i++) number = 3 * number + digits[i];
  return uint8_t((number * 256 + 242) / 243);
}

// 256 codes of row r of TQ1_0.
void write_ternary(const uint8_t* code, int r, uint8_t* unit) {
  constexpr Format f = format_of(TQ1_0);
  uint8_t rest[4][25] = {};
  for (int g = 0; g < 8; g++)
    for (int c = 0; c < 4; c++) {
      uint8_t digits[5];
      for (int j = 0; j < 5; j++) digits[j] = code[32 * g + 4 * j + c];
      for (int j = 0; j < 3; j++) rest[c][3 * g + j] = code[32 * g + 20 + 4 * j + c];
      unit[size_t(f.factor_bytes) + size_t(g) * group_bytes(f) + size_t(4 * r + c)] = ternary(digits);
    }
  for (int i = 0; i < 5; i++)
    for (int c = 0; c < 4; c++) unit[64 + 64 * i + 4 * r + c] = ternary(rest[c] + 5 * i);
}

constexpr size_t smaller(size_t a, size_t b) { return a < b ? a : b; }

// n rows of whole blocks become a panel, which is zero so far.
template <int type>
void pack_panel(const uint8_t* rows, size_t n, size_t n_in, uint8_t* out) {
  constexpr Format f = format_of(type);
  constexpr size_t block = size_t(f.block), unit_columns = size_t(f.unit);
  const size_t row_bytes = file_row_bytes(f, n_in);
  const auto raw = [&](size_t r, size_t column) { return rows + r * row_bytes + column / block * size_t(f.block_bytes); };
  const auto unit = [&](size_t column) { return out + column / unit_columns * unit_bytes(f); };
  if constexpr (is_float(f)) {
    constexpr size_t bytes = size_t(f.bits / 8);
    for (size_t first = 0; first < n_in; first += 32)
      for (size_t r = 0; r < n; r++)
        for (size_t k = first; k < smaller(n_in, first + 32); k++) {
          const size_t at = type == BF16 ? (k / 2 * 16 + r) * 2 + k % 2 : k * 16 + r;
          std::memcpy(out + at * bytes, raw(r, k), bytes);
        }
  } else if constexpr (f.n_vectors != 0) {
    for (size_t column = 0; column < n_in; column += block)
      for (size_t r = 0; r < n; r++) pack_codebook_block(type, raw(r, column), int(r), unit(column));
  } else if constexpr (f.bits == 4 && f.block == 32) {
    // A byte of the file has columns k and k + 16 of a group, and so has one of a panel.
    for (size_t column = 0; column < n_in; column += block) {
      uint8_t* codes = unit(column) + f.factor_bytes + column % unit_columns / 32 * group_bytes(f);
      for (size_t r = 0; r < n; r++) {
        const uint8_t* bytes = raw(r, column);
        Block factors;
        uint8_t apart[32];
        read_block<type>(bytes, factors, apart);
        write_factors<type>(factors, column, int(r), unit(column));
        for (size_t j = 0; j < 4; j++) std::memcpy(codes + 64 * j + 4 * r, bytes + f.block_bytes - 16 + 4 * j, 4);
      }
    }
  } else {
    // Whole units, as many columns as the largest have: all of them go through one step before any goes through the next,
    // which would else wait for memory that was just written in pieces of another size.
    constexpr size_t span = 256;
    alignas(64) uint8_t code[16][span] = {};
    for (size_t first = 0; first < n_in; first += span) {
      const size_t last = smaller(n_in, first + span);
      for (size_t r = 0; r < n; r++) {
        // The rows are too many for the hardware to see where they lead.
        if (last < n_in)
          for (size_t i = 0; i < span / block * size_t(f.block_bytes); i += 64) __builtin_prefetch(raw(r, last) + i);
        for (size_t column = first; column < last; column += block) {
          Block factors;
          read_block<type>(raw(r, column), factors, code[r] + (column - first));
          write_factors<type>(factors, column, int(r), unit(column));
        }
      }
      if constexpr (type == TQ1_0) {
        for (size_t r = 0; r < n; r++) write_ternary(code[r], int(r), unit(first));
      } else {
        Group groups[span / 32];
        for (size_t g = 0; first + 32 * g < last; g++) groups[g].fill(code[0] + 32 * g, span);
        for (size_t column = first; column < last; column += 32)
          write_codes<f.bits>(groups[(column - first) / 32],
                              unit(column) + f.factor_bytes + column % unit_columns / 32 * group_bytes(f));
      }
    }
  }
}

template <int type = 0>
PackFn pack_fn(int wanted) {
  if constexpr (type < n_types) {
    if constexpr (is_packed(type))
      if (type == wanted) return pack_panel<type>;
    return pack_fn<type + 1>(wanted);
  }
  return nullptr;
}

}  // namespace
}  // namespace mpillama
