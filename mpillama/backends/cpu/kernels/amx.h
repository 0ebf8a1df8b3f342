// Tiles of bf16. In assembly: gcc's intrinsics take a tile's number only as a literal, and do not tell the compiler which
// memory they read (gcc 12). What they do on a machine without tiles: tile_trap.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "tile_config.h"

namespace mpillama {
namespace {

// Sets this thread's tiles up, and puts into `before` what they were set up as: a library of the same process may count on it.
inline void tiles_begin(TileConfig* before) {
  __asm__ volatile("sttilecfg %0" : "=m"(*before));
  TileConfig config;
  config.palette = 1;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
// If they were not set up before, this releases them.
inline void tiles_end(const TileConfig* before) { __asm__ volatile("ldtilecfg %0" ::"m"(*before)); }
template <int t> inline void tile_zero() { __asm__ volatile("tilezero %%tmm%c0" ::"i"(t)); }
template <int t> inline void tile_load(const void* p, size_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int t> inline void tile_store(void* p, size_t stride) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(t) : "memory");
}
template <int c, int a, int b> inline void tile_product() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

}  // namespace
}  // namespace mpillama
