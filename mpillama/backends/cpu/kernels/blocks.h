// Blocks of GGUF files taken apart into codes and factors; the only place that knows the layouts of the file.
#pragma once
#include <cstdint>

#include "formats.h"

namespace mpillama {

// The f16 fields are the bits of the file. sc has the factors of each 16 or 32 weights where the type has such; for
// MXFP4 sc[0] is the exponent.
struct Block {
  uint8_t code[256];
  uint16_t d = 0, dmin = 0;
  uint8_t sc[16], mn[16];
};

// Takes one block of a packed, not floating-point type apart.
void read_block(int type, const uint8_t* block, Block& out);

}  // namespace mpillama
