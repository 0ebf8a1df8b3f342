// How the tiles of AMX are set up: what LDTILECFG reads (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2).
#pragma once
#include <cstdint>

namespace mpillama {

struct alignas(64) TileConfig {
  uint8_t palette = 0, start_row = 0, reserved[14] = {};  // palette 0: not set up
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

}  // namespace mpillama
