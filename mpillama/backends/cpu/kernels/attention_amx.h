// Attention of many queries on the tiles of AMX. To be included after the Simd of AVX-512.
//
// Tiles multiply numbers of bf16, which are too coarse for scores. So each float is the sum of two of them, and a product that of
// three: high * high + low * high + high * low, with a relative error of about 2^-16 (arXiv:1904.06376). What a cache keeps in f16
// or bf16 is such a sum without an error; f32 is not, and goes the way of `attention_panels.h`.
#pragma once
#include "amx.h"
#include "attention_impl.h"
#include "attention_panels.h"

namespace mpillama {
namespace {

// Rows and columns of what is multiplied at a time: two tiles. The operands' parts for 32 steps of the sum lie together:
// high parts of the first and the second 16 rows (or columns), then their low parts.
constexpr size_t pair = 32, part_values = 2 * tile_values, step_values = 2 * part_values;

// 32 numbers, a[i] and b[i] side by side: the order of the steps of a sum, of which both operands have the same.
inline void split(F a, F b, uint16_t* high) {
  const auto rounded = [](F x) { return _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x8000)); };
  const auto upper = [](__m512i x) { return _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(int(0xffff0000u)))); };
  const auto join = [](__m512i first, __m512i second) { return _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second); };
  const __m512i high_a = rounded(a), high_b = rounded(b);
  _mm512_storeu_si512(high, join(high_a, high_b));
  _mm512_storeu_si512(high + part_values, join(rounded(_mm512_sub_ps(a, upper(high_a))), rounded(_mm512_sub_ps(b, upper(high_b)))));
}

// c[32][32], rows `stride` floats apart, = or += the sum of n products of steps of a and b.
void multiply_split(const uint16_t* a, size_t a_stride, const uint16_t* b, size_t b_stride, size_t n, float* c, size_t stride, bool add) {
  const size_t bytes = stride * sizeof(float);
  float* lower = c + 16 * stride;
  if (add) {
    tile_load<0>(c, bytes), tile_load<1>(c + 16, bytes), tile_load<2>(lower, bytes), tile_load<3>(lower + 16, bytes);
  } else {
    tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  }
  const auto load_a = [](const uint16_t* p) { tile_load<4>(p, 64), tile_load<5>(p + tile_values, 64); };
  const auto load_b = [](const uint16_t* p) { tile_load<6>(p, 64), tile_load<7>(p + tile_values, 64); };
  const auto products = [] { tile_product<0, 4, 6>(), tile_product<1, 4, 7>(), tile_product<2, 5, 6>(), tile_product<3, 5, 7>(); };
  for (size_t i = 0; i < n; i++, a += a_stride, b += b_stride) {
    load_a(a), load_b(b + part_values), products();
    load_b(b), products();
    load_a(a + part_values), products();
  }
  tile_store<0>(c, bytes), tile_store<1>(c + 16, bytes), tile_store<2>(lower, bytes), tile_store<3>(lower + 16, bytes);
}

void attend_tiles(const AttentionStep& s, const AttentionItem& item, float* memory) {
  const size_t n_k = s.k.n_dim, n_v = s.v.n_dim, n_rows = item.n_tokens * item.n_heads, n_padded = round_up(n_rows, pair);
  const size_t k_steps = round_up(n_k, pair) / pair, v_width = round_up(n_v, pair);
  constexpr size_t score_stride = attention_span + 16;  // not a power of two, for the cache's sake
  static_assert(kv_block == pair, "a block is a step of the sums over tokens");
  float* at = memory;
  const auto floats = [&](size_t n) { return at += n, at - n; };
  const auto parts = [&](size_t n) { return reinterpret_cast<uint16_t*>(floats(n)); };  // two for each number
  float* o = floats(n_padded * v_width);             // [n_padded][v_width]
  float* l = floats(n_padded * 16);                  // [n_padded][16]
  float* m = floats(n_padded);                       // [n_padded]
  float* scores = floats(pair * score_stride);       // [32][score_stride]
  float* numbers = floats(kv_block * (k_steps * pair > v_width ? k_steps * pair : v_width));  // of a block of keys or values
  uint16_t* q = parts(n_padded * k_steps * pair);    // [n_padded / 32][k_steps]
  uint16_t* keys = parts(attention_span * k_steps * pair);  // [blocks][k_steps]
  uint16_t* values = parts(attention_span * v_width);    // [blocks][v_width / 32]
  uint16_t* weights = parts(attention_span * pair);      // [blocks]

  const float scale = s.softcap != 0 ? s.scale / s.softcap : s.scale;
  alignas(64) float padded[pair] = {};
  for (size_t r = 0; r < n_padded; r++) {
    const size_t row = r < n_rows ? r : n_rows - 1;  // the last one fills the pair
    const float* from = s.q + ((item.token + row / item.n_heads) * s.n_head + size_t(item.heads[row % item.n_heads])) * n_k;
    uint16_t* to = q + r / pair * k_steps * step_values + r % pair * 32;
    for (size_t i = 0; i < n_k; i += pair, to += step_values) {
      const float* x = from + i;
      if (n_k - i < pair) std::memcpy(padded, x, (n_k - i) * sizeof(float)), x = padded;
      split(Simd::mul(Simd::all(scale), Simd::load(x)), Simd::mul(Simd::all(scale), Simd::load(x + 16)), to);
    }
    m[r] = -infinity;
  }
  std::memset(l, 0, n_padded * 16 * sizeof(float));
  std::memset(o, 0, n_padded * v_width * sizeof(float));

  const auto tile_of = [&](const Tiles& t, size_t block) { return t.tile(size_t(item.table[block]), item.kv_head); };
  const size_t bytes = span_blocks * (tile_bytes(s.k.type, n_k) + tile_bytes(s.v.type, n_v));
  const size_t ahead_piece = round_up(bytes / (n_padded / pair) + 1, 64);
  TileConfig before;
  tiles_begin(&before);
  for (size_t begin = item.first_block; begin < item.last_block; begin += span_blocks) {
    const size_t end = begin + span_blocks < item.last_block ? begin + span_blocks : item.last_block;
    const int64_t start = int64_t(begin * kv_block), n = int64_t((end - begin) * kv_block);
    // What rows see of the span begins where the first does, and ends where the last does.
    const auto seen_of = [&](size_t row) { return seen_by(s, item.position + int64_t(row / item.n_heads), start, n); };
    const Seen all{seen_of(0).first, seen_of(n_rows - 1).last};
    for (size_t block = 0; block < end - begin; block++) {
      std::memset(numbers + n_k * kv_block, 0, (k_steps * pair - n_k) * kv_block * sizeof(float));
      expand_keys(s.k, tile_of(s.k, begin + block), numbers);
      for (size_t step = 0; step < k_steps; step++)
        for (size_t i = 0; i < 16; i++)
          for (size_t half = 0; half < 2; half++) {
            const float* x = numbers + (step * pair + i) * kv_block + half * 16;
            split(Simd::load(x), Simd::load(x + 16 * kv_block), keys + (block * k_steps + step) * step_values + half * tile_values + i * 32);
          }
      expand_values(s.v, tile_of(s.v, begin + block), numbers, v_width);
      // Values of tokens that nobody sees may be anything.
      for (int64_t i = 0; i < int64_t(kv_block); i++)
        if (const int64_t token = int64_t(block * kv_block) + i; token < all.first || token >= all.last)
          std::memset(numbers + size_t(i) * v_width, 0, v_width * sizeof(float));
      for (size_t i = 0; i < 16; i++)
        for (size_t column = 0; column < v_width; column += 16) {
          const float* x = numbers + i * v_width + column;
          split(Simd::load(x), Simd::load(x + 16 * v_width),
                values + (block * v_width + column / pair * pair) / pair * step_values + column / 16 % 2 * tile_values + i * 32);
        }
    }
    Ahead ahead{};
    for (size_t block = end; block < end + span_blocks && block < item.last_block; block++) {
      ahead.tiles[ahead.n_tiles++] = {tile_of(s.k, block), tile_bytes(s.k.type, n_k)};
      ahead.tiles[ahead.n_tiles++] = {tile_of(s.v, block), tile_bytes(s.v.type, n_v)};
    }
    ahead.piece = ahead_piece;
    for (size_t first_row = 0; first_row < n_rows; first_row += pair) {
      const size_t last_row = first_row + pair < n_rows ? first_row + pair : n_rows;
      const Seen some{seen_of(first_row).first, seen_of(last_row - 1).last};
      if (some.last <= some.first) continue;
      const size_t b0 = size_t(some.first) / kv_block, b1 = (size_t(some.last) - 1) / kv_block + 1;
      for (size_t b = b0; b < b1; b++)
        multiply_split(q + first_row / pair * k_steps * step_values, step_values, keys + b * k_steps * step_values, step_values, k_steps,
                       scores + b * kv_block, score_stride, false);
      ahead.fetch();
      const int64_t offset = int64_t(b0 * kv_block);
      for (size_t row = first_row; row < last_row; row++) {
        const Seen seen = seen_of(row);
        float* x = scores + (row - first_row) * score_stride + b0 * kv_block;
        weigh(x, (b1 - b0) * kv_block, s.softcap, {seen.first > offset ? seen.first - offset : 0, seen.last - offset}, m[row], l + row * 16,
              o + row * v_width, n_v);
        for (size_t b = b0; b < b1; b++, x += kv_block)
          split(Simd::load(x), Simd::load(x + 16), weights + b * step_values + (row - first_row) * 32);
      }
      for (size_t column = 0; column < v_width; column += pair)
        multiply_split(weights + b0 * step_values, step_values, values + (b0 * v_width + column) / pair * step_values,
                       v_width / pair * step_values, b1 - b0, o + first_row * v_width + column, v_width, true);
    }
  }
  tiles_end(&before);

  float* total = item.partial + round_up(n_rows, 16);
  float* sums = item.partial + 2 * round_up(n_rows, 16);
  for (size_t r = 0; r < n_rows; r++) {
    item.partial[r] = m[r];
    total[r] = Simd::sum(Simd::load(l + r * 16));
    std::memcpy(sums + r * sums_stride(n_v), o + r * v_width, n_v * sizeof(float));
  }
}

void attend_many(const AttentionStep& s, const AttentionItem& item, float* memory) {
  const bool exact = s.k.type == CacheType::f32 || s.v.type == CacheType::f32;
  (exact ? attend_panels : attend_tiles)(s, item, memory);
}

}  // namespace
}  // namespace mpillama
