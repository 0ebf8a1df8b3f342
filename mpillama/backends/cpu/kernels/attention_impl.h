// The kernels of `attention.h` over the vectors of a Simd, which is to be included before. A softmax that is computed block
// by block, with the largest score so far (arXiv:2205.14135, algorithm 1).
#pragma once
#include "attention.h"
#include "attention_multiply.h"
#include "elementwise_math.h"

namespace mpillama {
namespace {

constexpr float infinity = __builtin_inff();

// Blocks whose scores are made before they are weighed: fewer new largest scores, and longer vectors.
constexpr size_t span_blocks = attention_span / kv_block;

// Which tokens a row sees of those that follow `start`: [first, last), nothing if last <= first.
struct Seen {
  int64_t first, last;
};

inline Seen seen_by(const AttentionStep& s, int64_t position, int64_t start, int64_t n) {
  const int64_t first = s.window ? position - s.window + 1 - start : 0, last = position + 1 - start;
  return {first > 0 ? first : 0, last < n ? last : n};
}

// n scores of a row become weights; m, the sum of weights l (a vector) and the sums o follow a new largest score.
inline void weigh(float* scores, size_t n, float softcap, Seen seen, float& m, float* l, float* o, size_t n_sums) {
  constexpr size_t width = Simd::width;
  if (seen.last <= seen.first) {
    std::memset(scores, 0, n * sizeof(float));
    return;
  }
  if (softcap != 0)
    for (size_t i = 0; i < n; i += width)
      Simd::store(scores + i, Simd::mul(Simd::all(softcap), tanh(Simd::load(scores + i))));
  for (int64_t i = 0; i < seen.first; i++) scores[i] = -infinity;
  for (int64_t i = seen.last; i < int64_t(n); i++) scores[i] = -infinity;
  F top = Simd::load(scores);
  for (size_t i = width; i < n; i += width) top = Simd::max(Simd::load(scores + i), top);
  const float most = Simd::max_of(top);
  if (most > m) {
    const F factor = Simd::all(__builtin_expf(m - most));
    m = most;
    Simd::store(l, Simd::mul(factor, Simd::load(l)));
    for (size_t i = 0; i < n_sums; i += width) Simd::store(o + i, Simd::mul(factor, Simd::load(o + i)));
  }
  F total = Simd::load(l);
  for (size_t i = 0; i < n; i += width) {
    const F weight = exp_near_0<true>(Simd::sub(Simd::load(scores + i), Simd::all(m)));
    Simd::store(scores + i, weight);
    total = Simd::add(total, weight);
  }
  Simd::store(l, total);
}

// For few rows: they read tiles of the cache in whatever form they have.
void attend_rows(const AttentionStep& s, const AttentionItem& item, float* memory) {
  const size_t n_k = s.k.n_dim, n_v = s.v.n_dim, stride = sums_stride(n_v), n_rows = item.n_tokens * item.n_heads;
  float* q = memory;                                // [n_rows][n_k]
  float* scores = q + round_up(n_rows * n_k, 16);   // [n_rows][attention_span]
  float* l = scores + n_rows * attention_span;      // [n_rows][16]
  float* keys = l + n_rows * 16;                    // [n_k][kv_block]
  float* values = keys + n_k * kv_block;            // [kv_block][stride]
  float* m = item.partial;
  float* o = m + 2 * round_up(n_rows, 16);          // [n_rows][stride]

  const float scale = s.softcap != 0 ? s.scale / s.softcap : s.scale;
  for (size_t r = 0; r < n_rows; r++) {
    const size_t token = item.token + r / item.n_heads;
    const float* from = s.q + (token * s.n_head + size_t(item.heads[r % item.n_heads])) * n_k;
    for (size_t i = 0; i < n_k; i++) q[r * n_k + i] = from[i] * scale;
    m[r] = -infinity;
  }
  std::memset(l, 0, n_rows * 16 * sizeof(float));
  std::memset(o, 0, n_rows * stride * sizeof(float));

  const auto tile_of = [&](const Tiles& t, size_t block) { return t.tile(size_t(item.table[block]), item.kv_head); };
  // From the tile of a block to that of the next.
  const auto ahead_of = [&](const Tiles& t, size_t block) -> ptrdiff_t {
    return block + 1 < item.last_block ? tile_of(t, block + 1) - tile_of(t, block) : 0;
  };
  for (size_t begin = item.first_block; begin < item.last_block; begin += span_blocks) {
    const size_t end = begin + span_blocks < item.last_block ? begin + span_blocks : item.last_block;
    for (size_t block = begin; block < end; block++) {
      const uint8_t* tile = tile_of(s.k, block);
      float* out = scores + (block - begin) * kv_block;
      score_tile(s.k, tile, q, out, attention_span, n_rows, keys, ahead_of(s.k, block));
    }

    const int64_t start = int64_t(begin * kv_block), n = int64_t((end - begin) * kv_block);
    int64_t first = n, last = 0;
    for (size_t r = 0; r < n_rows; r++) {
      const Seen seen = seen_by(s, item.position + int64_t(r / item.n_heads), start, n);
      weigh(scores + r * attention_span, size_t(n), s.softcap, seen, m[r], l + r * 16, o + r * stride, n_v);
      if (seen.last <= seen.first) continue;
      first = seen.first < first ? seen.first : first;
      last = seen.last > last ? seen.last : last;
    }

    for (size_t block = begin; block < end; block++) {
      // Nobody sees the other tokens, which may never have been written.
      const int64_t offset = int64_t((block - begin) * kv_block);
      const size_t from = first > offset ? size_t(first - offset) : 0;
      const size_t to = last < offset ? 0 : last - offset < int64_t(kv_block) ? size_t(last - offset) : kv_block;
      if (to <= from) continue;
      const uint8_t* tile = tile_of(s.v, block);
      const float* weights = scores + offset;
      mix_tile(s.v, tile, from, to, weights, attention_span, o, stride, n_rows, values, ahead_of(s.v, block));
    }
  }
  float* total = m + round_up(n_rows, 16);
  for (size_t r = 0; r < n_rows; r++) total[r] = Simd::sum(Simd::load(l + r * 16));
}

template <void (*of_many)(const AttentionStep&, const AttentionItem&, float*)>
void attend(const AttentionStep& s, const AttentionItem& item, float* memory) {
  const bool few = item.n_tokens * item.n_heads <= size_t(Simd::max_rows);
  (few ? attend_rows : of_many)(s, item, memory);
}

void combine(const AttentionStep& s, const AttentionItem* items, size_t first, size_t last) {
  const AttentionItem& item = items[0];
  const size_t n_v = s.v.n_dim, stride = sums_stride(n_v), n_padded = round_up(item.n_tokens * item.n_heads, 16);
  for (size_t r = first; r < last; r++) {
    const size_t head = size_t(item.heads[r % item.n_heads]);
    float top = s.sinks ? s.sinks[head] : -infinity;
    for (size_t p = 0; p < item.n_parts; p++) top = items[p].partial[r] > top ? items[p].partial[r] : top;
    float total = s.sinks ? __builtin_expf(s.sinks[head] - top) : 0;
    for (size_t p = 0; p < item.n_parts; p++) {
      float* m = items[p].partial;
      m[r] = __builtin_expf(m[r] - top);
      total += m[n_padded + r] * m[r];
    }
    float* out = s.out + ((item.token + r / item.n_heads) * s.n_head + head) * n_v;
    const F inverse = Simd::all(1.0f / total);
    for (size_t i = 0; i < n_v; i += Simd::width) {
      F sum = Simd::zero();
      for (size_t p = 0; p < item.n_parts; p++) {
        const float* m = items[p].partial;
        sum = Simd::fma(Simd::all(m[r]), Simd::load(m + 2 * n_padded + r * stride + i), sum);
      }
      sum = Simd::mul(sum, inverse);
      if (n_v - i < size_t(Simd::width)) {
        Simd::store(out + i, sum, n_v - i);
      } else {
        Simd::store(out + i, sum);
      }
    }
  }
}

}  // namespace
}  // namespace mpillama
