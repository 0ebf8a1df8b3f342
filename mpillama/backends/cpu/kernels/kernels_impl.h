// The kernels of `kernels.h` over whichever `Vec`, and whichever product of quantized weights, was included before. Everything
// has internal linkage: what is compiled for one instruction set must never be taken for that of another.
#pragma once
#include <cstring>

#include "codec.h"
#include "kernels.h"
#include "panel.h"

namespace mpillama {
namespace {

// Column k of a group of 32.
template <int type>
inline Vec::Float column(const uint8_t* group, int k, int part) {
  if constexpr (type == F32) return Vec::load_float(group + 64 * k + 4 * Vec::lanes * part);
  if constexpr (type == F16) return Vec::load_half(group + 32 * k + 2 * Vec::lanes * part);
  const uint8_t* pair = group + 64 * (k / 2) + 4 * Vec::lanes * part;
  return k % 2 ? Vec::load_bf16<1>(pair) : Vec::load_bf16<0>(pair);
}

template <int type, int n>
void float_panel(const uint16_t*, const uint8_t* group, size_t n_groups, const uint8_t* x, float* const* y, int n_rows) {
  constexpr Format f = format_of(type);
  // A sum of its own for every fourth column: one alone would wait for the latency of each addition.
  constexpr int chains = n == 1 ? 4 : n == 2 ? 2 : 1;
  Vec::Float acc[parts][n][chains];
  for (int part = 0; part < parts; part++)
    for (int i = 0; i < n; i++)
      for (int c = 0; c < chains; c++) acc[part][i][c] = Vec::all(0.0f);
  for (size_t g = 0; g < n_groups; g++, group += group_bytes(f), x += float_group_bytes(n)) {
    fetch_ahead(group, group_bytes(f));
#pragma GCC unroll 4
    for (int k = 0; k < 32; k++)
      for (int part = 0; part < parts; part++) {
        const Vec::Float w = column<type>(group, k, part);
#pragma GCC unroll 16
        for (int i = 0; i < n; i++) {
          Vec::Float& a = acc[part][i][k % chains];
          a = Vec::fma(w, Vec::all(load_float(x + 128 * i + 4 * k)), a);
        }
      }
  }
  for (int part = 0; part < parts; part++)
    store_rows(y, n, part, n_rows, [&](int i) {
      Vec::Float sum = acc[part][i][0];
      for (int c = 1; c < chains; c++) sum = Vec::add(sum, acc[part][i][c]);
      return sum;
    });
}

template <int type, int log>
constexpr void set_panel(Kernels& kernels) {
  constexpr int n = 1 << log;
  constexpr int sizes = is_float(format_of(type)) ? Vec::float_block_sizes : Vec::block_sizes;
  if constexpr ((sizes & n) == 0) {
    kernels.panel[type][log] = nullptr;
  } else if constexpr (is_float(format_of(type))) {
    kernels.panel[type][log] = float_panel<type, n>;
  } else if constexpr (Vec::pairs && n > 1) {
    kernels.panel[type][log] = paired_panel<type, n>;
  } else {
    kernels.panel[type][log] = quantized_panel<type, n>;
  }
}

// Puts token i of n into a group, where tokens lie in pairs: 8 columns of one, then of the other.
inline void place_token(const int8_t* q, int n, int i, uint8_t* group) {
  const int step = n == 1 ? 8 : 16;
  for (int k = 0; k < 4; k++) std::memcpy(group + 64 * (i / 2) + 8 * (i % 2) + step * k, q + 8 * k, 8);
}

template <bool permuted>
void quantize_token(const float* x, size_t n_groups, int n, int i, uint8_t* block) {
  const size_t count = size_t(n), token = size_t(i);
  const IntGroup at = int_group(count);
  for (size_t g = 0; g < n_groups; g++, block += int_group_bytes(count)) {
    int32_t sums[2];
    int8_t alone[32];
    int8_t* q = Vec::pairs ? alone : reinterpret_cast<int8_t*>(block) + 32 * token;
    const float d = Vec::quantize(x + 32 * g, q, sums);
    if constexpr (permuted) {
      // See `column_at`: pairs of columns change places.
      uint16_t pairs[16], order[16];
      std::memcpy(pairs, q, 32);
      for (int k = 0; k < 16; k++) order[k] = pairs[k / 8 * 8 + k % 2 * 4 + k % 8 / 2];
      std::memcpy(q, order, 32);
    }
    if constexpr (Vec::pairs) place_token(q, n, i, block);
    const int32_t negative[3] = {-(sums[0] + sums[1]), -sums[0], -sums[1]};
    const float dsums[3] = {d * float(sums[0] + sums[1]), d * float(sums[0]), d * float(sums[1])};
    std::memcpy(block + at.d + 4 * token, &d, 4);
    std::memcpy(block + at.sum + 4 * token, negative, 4);
    std::memcpy(block + at.dsum + 4 * token, dsums, 4);
    std::memcpy(block + at.sums + 8 * token, negative + 1, 8);
    std::memcpy(block + at.dsums + 8 * token, dsums + 1, 8);
  }
}

void copy_token(const float* x, size_t n_groups, int n, int i, uint8_t* block) {
  for (size_t g = 0; g < n_groups; g++)
    std::memcpy(block + g * float_group_bytes(size_t(n)) + 128 * size_t(i), x + 32 * g, 128);
}

template <int type>
void read_row(const uint16_t* codebook, const uint8_t* unit, int row, size_t n, float* out) {
  constexpr Format f = format_of(type);
  const int part = row / Vec::lanes, r = row % Vec::lanes;
  if constexpr (is_float(f)) {
    for (size_t i = 0; i < n; i += 32, unit += group_bytes(f))
      for (int k = 0; k < 32 && i + size_t(k) < n; k++) {
        float lanes[Vec::lanes];
        Vec::store(lanes, column<type>(unit, k, part), Vec::lanes);
        out[i + size_t(k)] = lanes[r];
      }
    return;
  } else {
    for (size_t i = 0; i < n; i += 32) {
      const int g = int(i % size_t(f.unit) / 32);
      if (i && g == 0) unit += unit_bytes(f);
      Vec::Bytes w[8];
      unpack<type>(codebook, unit, g, part, w);
      const FactorVecs fv = factors<type>(unit, g, part);
      uint8_t codes[8][4 * Vec::lanes];
      for (int j = 0; j < 8; j++) Vec::store_bytes(codes[j], w[j]);
      const auto lane = [&](const Vec::Float& v) {
        float lanes[Vec::lanes];
        Vec::store(lanes, v, Vec::lanes);
        return lanes[r];
      };
      const float s[2] = {lane(fv.s0), has_halves(f) ? lane(fv.s1) : lane(fv.s0)};
      float m[2] = {};
      if constexpr (has_min(f)) m[0] = lane(fv.m0), m[1] = has_halves(f) ? lane(fv.m1) : m[0];
      for (int k = 0; k < 32; k++)
        out[i + size_t(column_at(f, k))] = s[k / 16] * float(codes[k / 4][4 * r + k % 4] - f.offset) - m[k / 16];
    }
  }
}

template <int type>
constexpr void set_type(Kernels& k) {
  k.row[type] = read_row<type>;
  set_panel<type, 0>(k), set_panel<type, 1>(k), set_panel<type, 2>(k), set_panel<type, 3>(k), set_panel<type, 4>(k);
}

constexpr Kernels make_kernels() {
  Kernels k{};
  k.quantize = quantize_token<false>;
  k.quantize_permuted = quantize_token<true>;
  k.copy = copy_token;
  set_type<F32>(k), set_type<F16>(k), set_type<BF16>(k);
  set_type<Q4_0>(k), set_type<Q4_1>(k), set_type<Q5_0>(k), set_type<Q5_1>(k), set_type<Q8_0>(k);
  set_type<Q2_K>(k), set_type<Q3_K>(k), set_type<Q4_K>(k), set_type<Q5_K>(k), set_type<Q6_K>(k);
  set_type<IQ4_NL>(k), set_type<IQ4_XS>(k), set_type<MXFP4>(k), set_type<NVFP4>(k);
  set_type<Q1_0>(k), set_type<Q2_0>(k), set_type<TQ1_0>(k), set_type<TQ2_0>(k);
  set_type<IQ1_S>(k), set_type<IQ1_M>(k), set_type<IQ2_XXS>(k), set_type<IQ2_XS>(k), set_type<IQ2_S>(k);
  set_type<IQ3_XXS>(k), set_type<IQ3_S>(k);
  return k;
}

}  // namespace
}  // namespace mpillama
