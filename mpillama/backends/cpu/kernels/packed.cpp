#include "packed.h"

#include <cstdlib>
#include <cstring>
#include <new>

#include "blocks.h"
#include "half.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mpillama {
namespace {

constexpr size_t huge = size_t(2) << 20;

// The factors of one block of row r, whose first column is `column`; unit is where its unit begins.
void write_factors(const Format& f, const Block& block, size_t column, int r, uint8_t* unit) {
  const size_t group = column % size_t(f.unit) / 32;
  const auto put_half = [&](size_t at, uint16_t bits) { std::memcpy(unit + at + 2 * r, &bits, 2); };
  switch (f.factors) {
    case Factors::none: break;
    case Factors::half: put_half(32 * group, block.d); break;
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
  }
}

// 32 codes of row r into the planes of a group, which are zero so far; four bytes at a time, each for itself.
void write_codes(int bits, const uint8_t* code, int r, uint8_t* group) {
  for (int j = 0; j < 8; j++) {
    uint32_t four;
    std::memcpy(&four, code + 4 * j, 4);
    const auto merge = [&](int plane, uint32_t value) {
      uint32_t word;
      std::memcpy(&word, group + plane + 4 * r, 4);
      word |= value;
      std::memcpy(group + plane + 4 * r, &word, 4);
    };
    const uint32_t ones = 0x01010101;
    if (bits == 8) {
      merge(64 * j, four);
      continue;
    }
    if (bits >= 4) {
      merge(64 * (j % 4), (four & 15 * ones) << (4 * (j / 4)));
    } else {
      merge(64 * (j / 4), (four & 3 * ones) << (2 * (j % 4)));
    }
    if (bits == 6) merge(256 + 64 * (j / 4), (four >> 4 & 3 * ones) << (2 * (j % 4)));
    if (bits == 5) merge(256, (four >> 4 & ones) << j);
    if (bits == 3) merge(128, (four >> 2 & ones) << j);
  }
}

unsigned read_code(int bits, const uint8_t* group, int r, int k) {
  const int j = k / 4, at = 4 * r + k % 4;
  const auto nibble = [&] { return group[64 * (j % 4) + at] >> (4 * (j / 4)) & 15u; };
  const auto pair = [&](int plane) { return group[plane + 64 * (j / 4) + at] >> (2 * (j % 4)) & 3u; };
  switch (bits) {
    case 8: return group[64 * j + at];
    case 6: return nibble() | pair(256) << 4;
    case 5: return nibble() | (group[256 + at] >> j & 1u) << 4;
    case 4: return nibble();
    case 3: return pair(0) | (group[128 + at] >> j & 1u) << 2;
    default: return pair(0);
  }
}

struct Affine {
  float s, m;
};

// S and M of a half group of row r.
Affine read_factors(const Format& f, const uint8_t* unit, size_t group, size_t half, int r) {
  const auto half_at = [&](size_t at) {
    uint16_t bits;
    std::memcpy(&bits, unit + at + 2 * r, 2);
    return half_to_float(bits);
  };
  const size_t row = size_t(r);
  switch (f.factors) {
    case Factors::half: return {half_at(32 * group), 0};
    case Factors::half_min: return {half_at(32 * group), half_at(64 + 32 * group)};
    case Factors::super_min:
      return {half_at(0) * float(unit[64 + 16 * group + row]), half_at(32) * float(unit[192 + 16 * group + row])};
    case Factors::super_16: return {half_at(0) * float(int8_t(unit[32 + 16 * (2 * group + half) + row])), 0};
    case Factors::super_32: return {half_at(0) * float(int8_t(unit[32 + 16 * group + row])), 0};
    case Factors::nibbles: {
      const uint8_t both = unit[64 + 16 * (2 * group + half) + row];
      return {half_at(0) * float(both & 15), half_at(32) * float(both >> 4)};
    }
    case Factors::exponent: {
      const uint32_t e = unit[16 * group + row];
      return {float_of((e ? e - 1 : 0) << 23), 0};
    }
    default: return {0, 0};
  }
}

}  // namespace

Pages::Pages(size_t bytes) {
  if (bytes == 0) return;
#if defined(__linux__)
  if (bytes >= huge) {
    mapped_ = bytes + huge;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapping_) + huge - 1) / huge * huge);
    madvise(data_, bytes, MADV_HUGEPAGE);
    return;
  }
#endif
  data_ = static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!data_) throw std::bad_alloc();
}

Pages::~Pages() {
#if defined(__linux__)
  if (mapping_) {
    munmap(mapping_, mapped_);
    return;
  }
#endif
  std::free(data_);
}

PackedWeight::PackedWeight(Pool& pool, int type_, const uint8_t* raw, size_t n_mats_, size_t n_rows_, size_t n_in_)
    : type(type_),
      format(format_of(type_)),
      n_mats(n_mats_),
      n_rows(n_rows_),
      n_in(n_in_),
      n_panels((n_rows_ + 15) / 16),
      n_units(units(format, n_in_)),
      panel_bytes(mpillama::panel_bytes(format, n_in_)),
      pages_(n_mats_ * n_panels * panel_bytes) {
  const size_t row_bytes = file_row_bytes(format, n_in);
  const auto lock = pool.lock();
  pool.parallel_for(n_mats * n_panels, 4, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) {
      const size_t mat = i / n_panels, row = i % n_panels * 16;
      pack_panel(raw + (mat * n_rows + row) * row_bytes, std::min<size_t>(16, n_rows - row),
                 pages_.data() + i * panel_bytes);
    }
  });
}

void PackedWeight::pack_panel(const uint8_t* rows, size_t n, uint8_t* out) const {
  const size_t row_bytes = file_row_bytes(format, n_in);
  std::memset(out, 0, panel_bytes);
  for (int r = 0; r < int(n); r++, rows += row_bytes) {
    if (is_float(format)) {
      const size_t bytes = size_t(format.bits / 8);
      for (size_t k = 0; k < n_in; k++) {
        const size_t at = type == BF16 ? (k / 2 * 16 + size_t(r)) * 2 + k % 2 : k * 16 + size_t(r);
        std::memcpy(out + at * bytes, rows + k * bytes, bytes);
      }
      continue;
    }
    Block block;
    for (size_t column = 0; column < n_in; column += size_t(format.block)) {
      read_block(type, rows + column / size_t(format.block) * size_t(format.block_bytes), block);
      uint8_t* unit = out + column / size_t(format.unit) * unit_bytes(format);
      write_factors(format, block, column, r, unit);
      for (int k = 0; k < format.block; k += 32) {
        const size_t group = (column + size_t(k)) % size_t(format.unit) / 32;
        write_codes(format.bits, block.code + k, r, unit + size_t(format.factor_bytes) + group * group_bytes(format));
      }
    }
  }
}

void PackedWeight::read_row(size_t row, float* out) const {
  const uint8_t* data = panel(0, row / 16);
  const int r = int(row % 16);
  if (is_float(format)) {
    for (size_t k = 0; k < n_in; k++) {
      const size_t at = type == BF16 ? (k / 2 * 16 + size_t(r)) * 2 + k % 2 : k * 16 + size_t(r);
      uint16_t bits;
      if (type == F32) {
        std::memcpy(out + k, data + 4 * at, 4);
      } else {
        std::memcpy(&bits, data + 2 * at, 2);
        out[k] = type == F16 ? half_to_float(bits) : bf16_to_float(bits);
      }
    }
    return;
  }
  const Entries table = entries(format.table);
  for (size_t column = 0; column < n_in; column += 16) {
    const uint8_t* unit = data + column / size_t(format.unit) * unit_bytes(format);
    const size_t group = column % size_t(format.unit) / 32, half = column / 16 % 2;
    const Affine a = read_factors(format, unit, group, half, r);
    const uint8_t* codes = unit + size_t(format.factor_bytes) + group * group_bytes(format);
    for (int k = 0; k < 16; k++) {
      const unsigned code = read_code(format.bits, codes, r, int(16 * half) + k);
      const int value = (format.table == Table::none ? int(code) : int(table.values[code])) - format.offset;
      out[column + size_t(k)] = a.s * float(value) - a.m;
    }
  }
}

}  // namespace mpillama
