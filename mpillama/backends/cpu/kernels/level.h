// Which instruction sets the kernels may use on this machine.
#pragma once
#include <cstddef>
#include <string>
#include <vector>

namespace mpillama {

// Each level includes those before it of the same architecture. x86: avx2: AVX2, FMA, F16C. avx512: F, BW, VL, DQ, VNNI. amx: AMX
// tiles of bf16. ARM: neon: what ARMv8 has. dotprod: DotProd. i8mm: I8MM. Of its own: sve512: SVE with vectors of 512 bits.
enum class Level { scalar, avx2, avx512, amx, neon, dotprod, i8mm, sve512 };

// The levels that this machine and this build have, in ascending order. Asks the kernel for the use of AMX tiles, which are
// there too if they are trapped (tile_trap.h).
std::vector<Level> available_levels();

const char* level_name(Level level);

// "" means the highest that the machine itself has. Throws std::invalid_argument for an unknown name or a level that is not available.
Level choose_level(const std::string& name);

// How this machine likes to be told what of the weights will be read: how many bytes before, whether into the first level of its
// caches or the second, and how many bytes before it is then to come from the second into the first (0: never). Measured best
// for rows of 2048 and 8192 weights.
struct Lookahead {
  size_t bytes;
  bool first_level;
  size_t near;
};
extern const Lookahead lookahead;

// Asks for the line of memory at p, in that way.
static inline void fetch_line(const void* p) {
  if (lookahead.first_level) {
    __builtin_prefetch(p, 0, 3);
  } else {
    __builtin_prefetch(p, 0, 2);
  }
}

}  // namespace mpillama
