// Vectors of floats for attention and the small ops in plain C++, for compilers to make the best of.
#pragma once
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "attention.h"
#include "half.h"

namespace mpillama {
namespace {

struct Simd {
  static constexpr int width = 8;
  static constexpr int max_rows = 2;
  static constexpr int panel_vectors = 1, panel_columns = 4;
  struct F { float v[8]; };

  template <class Fn> static F make(Fn fn) {
    F r;
    for (int i = 0; i < width; i++) r.v[i] = fn(i);
    return r;
  }
  static F zero() { return all(0); }
  static F all(float x) { return make([&](int) { return x; }); }
  static F load(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
  static F load(const float* p, size_t n) { F r = zero(); std::memcpy(r.v, p, n * sizeof(float)); return r; }
  static F load(const Half* p) { return make([&](int i) { return half_to_float(p[i].bits); }); }
  static F load(const Bf16* p) { return make([&](int i) { return bf16_to_float(p[i].bits); }); }
  static F load(const int8_t* p) { return make([&](int i) { return float(p[i]); }); }
  static F load(const LowNibble* p) { return load_nibbles<0>(&p->bits); }
  static F load(const HighNibble* p) { return load_nibbles<4>(&p->bits); }
  // Codes of 4 bits less 8, from the lower or the upper half of each byte.
  template <int shift> static F load_nibbles(const uint8_t* p) {
    return make([&](int i) { return float((p[i] >> shift & 15) - 8); });
  }
  static void store(float* p, const F& x) { std::memcpy(p, x.v, sizeof x.v); }
  static void store(float* p, const F& x, size_t n) { std::memcpy(p, x.v, n * sizeof(float)); }
  static void store(Half* p, const F& x) { for (int i = 0; i < width; i++) p[i] = to_half(x.v[i]); }
  static void store(Bf16* p, const F& x) {
    for (int i = 0; i < width; i++) {
      const uint32_t bits = bits_of(x.v[i]);
      p[i].bits = uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
  }
  static uint32_t bits_of(float x) { uint32_t bits; std::memcpy(&bits, &x, 4); return bits; }
  static float to_float(Half h) { return half_to_float(h.bits); }
  // Round to nearest even, as F16C does.
  static Half to_half(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};
    // Below 2^-14 the sum with 1/2 has the last bits of a subnormal at its end, and the addition rounds.
    if (magnitude < 0x38800000) return {uint16_t(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3f000000))};
    return {uint16_t(sign | (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13)};
  }

  static F add(const F& a, const F& b) { return make([&](int i) { return a.v[i] + b.v[i]; }); }
  static F sub(const F& a, const F& b) { return make([&](int i) { return a.v[i] - b.v[i]; }); }
  static F mul(const F& a, const F& b) { return make([&](int i) { return a.v[i] * b.v[i]; }); }
  static F div(const F& a, const F& b) { return make([&](int i) { return a.v[i] / b.v[i]; }); }
  static F fma(const F& a, const F& b, const F& c) { return make([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
  // The second argument where either is not a number.
  static F min(const F& a, const F& b) { return make([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
  static F max(const F& a, const F& b) { return make([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static F abs(const F& a) { return make([&](int i) { return __builtin_fabsf(a.v[i]); }); }
  static F round(const F& a) { return make([&](int i) { return __builtin_rintf(a.v[i]); }); }
  // n from -126 to 127; where n is not a number, a is none either.
  static F times_power_of_2(const F& a, const F& n) {
    return make([&](int i) { return a.v[i] * float_of(uint32_t(n.v[i] >= -126 ? int(n.v[i]) + 127 : 0) << 23); });
  }
  static F if_less(const F& a, const F& b, const F& yes, const F& no) {
    return make([&](int i) { return a.v[i] < b.v[i] ? yes.v[i] : no.v[i]; });
  }
  // Each pair of lanes exchanged.
  static F swap_pairs(const F& a) { return make([&](int i) { return a.v[i ^ 1]; }); }
  static float sum(const F& a) {
    return (a.v[0] + a.v[4] + (a.v[2] + a.v[6])) + (a.v[1] + a.v[5] + (a.v[3] + a.v[7]));
  }
  static bool at_most(const F& a, const F& b) {
    int n = 0;
    for (int i = 0; i < width; i++) n += a.v[i] <= b.v[i];
    return n == width;
  }
  static float max_of(const F& a) {
    float top = a.v[0];
    for (int i = 1; i < width; i++) top = a.v[i] > top ? a.v[i] : top;
    return top;
  }
  static void prefetch(const void*) {}
};

using F = Simd::F;

}  // namespace
}  // namespace mpillama
