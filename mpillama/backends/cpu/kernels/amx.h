// Tiles of bf16. In assembly: gcc's intrinsics take a tile's number only as a literal, and do not tell the compiler which
// memory they read (gcc 12).
//
// With MPILLAMA_EMULATE_AMX the tiles are arrays, so that what is built on them can be tested on any machine with AVX512.
#pragma once
#include <immintrin.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace mpillama {
namespace {

#if MPILLAMA_EMULATE_AMX

struct Tile {
  uint8_t bytes[16][64];
};
thread_local Tile tiles_of_thread[8];

inline void tiles_begin() {}
inline void tiles_end() {}
template <int t> void tile_zero() { std::memset(&tiles_of_thread[t], 0, sizeof(Tile)); }
template <int t> void tile_load(const void* p, size_t stride) {
  for (size_t i = 0; i < 16; i++) std::memcpy(tiles_of_thread[t].bytes[i], static_cast<const uint8_t*>(p) + i * stride, 64);
}
template <int t> void tile_store(void* p, size_t stride) {
  for (size_t i = 0; i < 16; i++) std::memcpy(static_cast<uint8_t*>(p) + i * stride, tiles_of_thread[t].bytes[i], 64);
}
template <int c, int a, int b> void tile_product() {
  const auto value = [](int tile, int row, int column) {
    uint16_t bits;
    std::memcpy(&bits, tiles_of_thread[tile].bytes[row] + 2 * column, 2);
    const uint32_t wide = uint32_t(bits) << 16;
    float f;
    std::memcpy(&f, &wide, 4);
    return f;
  };
  for (int m = 0; m < 16; m++)
    for (int n = 0; n < 16; n++) {
      float sum;
      std::memcpy(&sum, tiles_of_thread[c].bytes[m] + 4 * n, 4);
      for (int k = 0; k < 32; k++) sum += value(a, m, k) * value(b, k / 2, 2 * n + k % 2);
      std::memcpy(tiles_of_thread[c].bytes[m] + 4 * n, &sum, 4);
    }
}

// 16 floats of each operand to bf16, rounded to nearest even: those of `first` come first.
inline __m512i to_bf16(__m512 first, __m512 second) {
  const auto round = [](__m512 x) {
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff)), 16));
  };
  return _mm512_inserti64x4(_mm512_castsi256_si512(round(first)), round(second), 1);
}

#else

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

inline void tiles_begin() {
  TileConfig config;
  for (int i = 0; i < 8; i++) {
    config.row_bytes[i] = 64;
    config.rows[i] = 16;
  }
  __asm__ volatile("ldtilecfg %0" ::"m"(config));
}
inline void tiles_end() { __asm__ volatile("tilerelease"); }
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

inline __m512i to_bf16(__m512 first, __m512 second) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)); }

#endif

}  // namespace
}  // namespace mpillama
