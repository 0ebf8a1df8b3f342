// What the products of panels have in common, for whichever `Vec` was included before.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace mpillama {
namespace {

constexpr int parts = 16 / Vec::lanes;

// Of the levels whose tokens lie in pairs (Vec::pairs), for 2 tokens and more.
template <int type, int n>
void paired_panel(const uint16_t* codebook, const uint8_t* unit, size_t n_units, const uint8_t* x, float* const* y, int n_rows);

// Asks for memory that will be read after the n bytes at p.
inline void fetch_ahead(const uint8_t* p, size_t n) {
  for (size_t i = 0; i < n; i += 64) {
    Vec::prefetch(p + lookahead.bytes + i);
    if (lookahead.near) __builtin_prefetch(p + lookahead.near + i, 0, 3);
  }
}

inline float load_float(const uint8_t* p) {
  float value;
  std::memcpy(&value, p, 4);
  return value;
}

inline int32_t load_int(const uint8_t* p) {
  int32_t value;
  std::memcpy(&value, p, 4);
  return value;
}

// Row by row of y, the lanes of one part of a panel that has n_rows rows; vector(i) has those of token i.
template <class F>
inline void store_rows(float* const* y, int n, int part, int n_rows, const F& vector) {
  const int rest = n_rows - part * Vec::lanes;
  for (int i = 0; i < n && rest > 0; i++) Vec::store(y[i] + part * Vec::lanes, vector(i), rest < Vec::lanes ? rest : Vec::lanes);
}

}  // namespace
}  // namespace mpillama
