// Vectors for `kernels_impl.h` in plain C++, for compilers to make the best of.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace mpillama {
namespace {

struct Vec {
  static constexpr int lanes = 16;
  static constexpr int block_sizes = 1 | 4, float_block_sizes = block_sizes;  // for how many tokens there are kernels
  // Whether tokens lie in pairs (`place_token`), and whether both factors of products of bytes are signed.
  static constexpr bool pairs = false, signed_bytes = false;

  struct Bytes { uint8_t v[64]; };
  struct Int { int32_t v[16]; };
  struct Float { float v[16]; };

  static Bytes load(const uint8_t* p) { Bytes r; std::memcpy(r.v, p, 64); return r; }
  template <int shift, int mask> static Bytes right(Bytes a) {
    for (uint8_t& b : a.v) b = uint8_t(b >> shift & mask);
    return a;
  }
  // a | (b << shift & mask), or >> for a negative shift
  template <int shift, int mask> static Bytes merge(Bytes a, const Bytes& b) {
    for (int i = 0; i < 64; i++)
      a.v[i] = uint8_t(a.v[i] | ((shift >= 0 ? b.v[i] << (shift >= 0 ? shift : 0) : b.v[i] >> (shift < 0 ? -shift : 0)) & mask));
    return a;
  }
  static Bytes lookup(const uint8_t* table, Bytes a) {
    for (uint8_t& b : a.v) b = table[b];
    return a;
  }
  static Bytes either(Bytes a, const Bytes& b) { for (int i = 0; i < 64; i++) a.v[i] |= b.v[i]; return a; }
  static Bytes differ(Bytes a, const Bytes& b) { for (int i = 0; i < 64; i++) a.v[i] ^= b.v[i]; return a; }
  // Calls f(lane) for lanes of type T, which become what it returns.
  template <class T, class F> static Bytes each(Bytes a, F f) {
    T lane[64 / sizeof(T)];
    std::memcpy(lane, a.v, 64);
    for (T& value : lane) value = T(f(value));
    std::memcpy(a.v, lane, 64);
    return a;
  }
  // Lanes of 16 or 32 bits: a >> shift & mask, and a << shift.
  static Bytes right16(const Bytes& a, int shift, int mask) {
    return each<uint16_t>(a, [&](uint16_t v) { return v >> shift & mask; });
  }
  template <int shift> static Bytes left16(const Bytes& a) {
    return each<uint16_t>(a, [](uint16_t v) { return v << shift; });
  }
  static Bytes right32(const Bytes& a, int shift, uint32_t mask) {
    return each<uint32_t>(a, [&](uint32_t v) { return v >> shift & mask; });
  }
  template <int shift> static Bytes left32(const Bytes& a) {
    return each<uint32_t>(a, [](uint32_t v) { return v << shift; });
  }
  // 8 or 16 bits for each lane of 32.
  static Bytes widen8(const uint8_t* p) { Bytes r{}; for (int i = 0; i < 16; i++) r.v[4 * i] = p[i]; return r; }
  static Bytes widen16(const uint8_t* p) {
    Bytes r{};
    for (int i = 0; i < 32; i++) r.v[4 * (i / 2) + i % 2] = p[i];
    return r;
  }
  static Float lanes_to_float(const Bytes& a) { Int i; std::memcpy(i.v, a.v, 64); return to_float(i); }
  static Float half_lanes_to_float(const Bytes& a) {
    Float r;
    for (int i = 0; i < 16; i++) r.v[i] = half_to_float(uint16_t(a.v[4 * i] | a.v[4 * i + 1] << 8));
    return r;
  }
  // a * factor modulo 256, and a * 3 / 256, in each byte.
  static Bytes times8(const Bytes& a, int factor) { return each<uint8_t>(a, [&](uint8_t v) { return v * factor; }); }
  static Bytes third(const Bytes& a) { return each<uint8_t>(a, [](uint8_t v) { return v * 3 >> 8; }); }
  // Entries of a table of n words, in each 16 bits.
  template <int n> static Bytes lookup_words(const uint16_t* table, const Bytes& index) {
    return each<uint16_t>(index, [&](uint16_t i) { return table[i]; });
  }
  template <int factor> static Int times(int32_t value) { Int r; for (int32_t& i : r.v) i = factor * value; return r; }
  template <int n> static Int dots(Int a, const Bytes* w, const int8_t* x) {
    for (int j = 0; j < n; j++, w++, x += 4)
      for (int i = 0; i < 16; i++)
        a.v[i] += w->v[4 * i] * x[0] + w->v[4 * i + 1] * x[1] + w->v[4 * i + 2] * x[2] + w->v[4 * i + 3] * x[3];
    return a;
  }

  static Float all(float value) { Float r; for (float& f : r.v) f = value; return r; }
  static Float to_float(const Int& a) { Float r; for (int i = 0; i < 16; i++) r.v[i] = float(a.v[i]); return r; }
  static Float load_float(const uint8_t* p) { Float r; std::memcpy(r.v, p, 64); return r; }
  static Float load_half(const uint8_t* p) {
    uint16_t h[16];
    std::memcpy(h, p, 32);
    Float r;
    for (int i = 0; i < 16; i++) r.v[i] = half_to_float(h[i]);
    return r;
  }
  // The first or second of each pair of bf16.
  template <int which> static Float load_bf16(const uint8_t* p) {
    uint32_t pairs[16];
    std::memcpy(pairs, p, 64);
    Float r;
    for (int i = 0; i < 16; i++) r.v[i] = float_of(which ? pairs[i] & 0xffff0000 : pairs[i] << 16);
    return r;
  }
  static Float load_u8(const uint8_t* p) { Float r; for (int i = 0; i < 16; i++) r.v[i] = float(p[i]); return r; }
  static Float load_i8(const uint8_t* p) { Float r; for (int i = 0; i < 16; i++) r.v[i] = float(int8_t(p[i])); return r; }
  template <int shift> static Float load_nibble(const uint8_t* p) {
    Float r;
    for (int i = 0; i < 16; i++) r.v[i] = float(p[i] >> shift & 15);
    return r;
  }
  // 2^(e - 128) of bytes e; 0 for the two smallest
  static Float load_exponent(const uint8_t* p) {
    Float r;
    for (int i = 0; i < 16; i++) r.v[i] = float_of(uint32_t(p[i] ? p[i] - 1 : 0) << 23);
    return r;
  }
  // Half of numbers in E4M3 without a sign.
  static Float load_ue4m3(const uint8_t* p) {
    Float r;
    for (int i = 0; i < 16; i++) r.v[i] = 128 * half_to_float(uint16_t(p[i] << 7));
    return r;
  }
  static Float mul(Float a, const Float& b) { for (int i = 0; i < 16; i++) a.v[i] *= b.v[i]; return a; }
  static Float fma(const Float& a, const Float& b, Float c) { for (int i = 0; i < 16; i++) c.v[i] += a.v[i] * b.v[i]; return c; }
  static Float fnma(const Float& a, const Float& b, Float c) { for (int i = 0; i < 16; i++) c.v[i] -= a.v[i] * b.v[i]; return c; }
  static Float add(Float a, const Float& b) { for (int i = 0; i < 16; i++) a.v[i] += b.v[i]; return a; }
  static void store(float* p, const Float& a, int n) { std::memcpy(p, a.v, size_t(n) * 4); }
  static void store_bytes(uint8_t* p, const Bytes& a) { std::memcpy(p, a.v, 64); }
  static void prefetch(const uint8_t*) {}

  // 32 values of x as int8 with one factor; the sums of the first and the last 16.
  static float quantize(const float* x, int8_t* q, int32_t* sums) {
    float top = 0;
    for (int i = 0; i < 32; i++) top = std::fmax(top, std::fabs(x[i]));
    const float inverse = top > 0 ? 127.0f / top : 0.0f;
    sums[0] = sums[1] = 0;
    for (int i = 0; i < 32; i++) {
      const int value = int(std::nearbyint(x[i] * inverse));
      q[i] = int8_t(value);
      sums[i / 16] += value;
    }
    return top / 127.0f;
  }
};

}  // namespace
}  // namespace mpillama
