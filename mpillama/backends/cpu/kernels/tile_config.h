// The tiles of AMX, and how they are set up: what LDTILECFG reads (Intel 64 and IA-32 Architectures Software Developer's Manual,
// volume 2).
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpillama {

constexpr size_t tile_values = 512;  // of bf16: 16 rows of 32

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};  // palette 0: not set up
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace mpillama
