// f16 and bf16 on machines without instructions for them.
#pragma once
#include <cstdint>
#include <cstring>

namespace mpillama {
namespace {

inline float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

// IEEE 754 binary16, subnormals included.
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff;
  if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
  // The exponents differ by 112; a product with a power of two renormalizes subnormals and is exact.
  return float_of(sign | magnitude << 13) * float_of(0x77800000);
}

inline float bf16_to_float(uint16_t b) { return float_of(uint32_t(b) << 16); }

}  // namespace
}  // namespace mpillama
