// Blocks of GGUF files taken apart into codes and factors; the only place that knows the layouts of the file.
#pragma once
#include <cstdint>

#include "formats.h"

namespace mpillama {

// The f16 fields are the bits of the file. sc has the factors of each 16 or 32 weights where the type has such, in Q3_K
// with 32 added; for MXFP4 sc[0] is the exponent.
struct Block {
  uint16_t d = 0, dmin = 0;
  uint8_t sc[16], mn[16];
};

// Takes one block of a quantized type without a codebook apart; its codes go to `code`.
void read_block(int type, const uint8_t* block, Block& out, uint8_t* code);

// Writes the block of row r (0..15), of a type with a codebook, into a unit that is zero there.
void pack_codebook_block(int type, const uint8_t* block, int r, uint8_t* unit);

}  // namespace mpillama
