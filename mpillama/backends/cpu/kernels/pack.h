// Packing: from rows of a file's blocks to panels as `formats.h` describes them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpillama {

// n <= 16 rows of whole blocks, one after the other, become a panel, which is zero so far.
using PackFn = void (*)(const uint8_t* rows, size_t n, size_t n_in, uint8_t* out);

// What packs a type; null for types that cannot be packed.
PackFn scalar_pack(int type);
#if MPILLAMA_X86
PackFn avx2_pack(int type);
#endif

}  // namespace mpillama
