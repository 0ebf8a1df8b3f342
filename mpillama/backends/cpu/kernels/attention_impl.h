// The kernels of `attention.h` over the vectors of a Simd, which is to be included before. A softmax that is computed block
// by block, with the largest score so far (arXiv:2205.14135, algorithm 1).
#pragma once
#include "attention.h"
#include "attention_tiles.h"
#include "elementwise_math.h"

namespace mpillama {
namespace {

constexpr float infinity = __builtin_inff();

// c[n_rows][n_vectors * width] = or += a[n_rows][depth] times b[depth][...]; the rows are lda, ldb and ldc elements apart.
// What lies `ahead` bytes after the elements of b that are read is fetched into the cache.
template <int n_rows, int n_vectors, bool add, class T>
void multiply_block(const float* a, size_t lda, const T* b, size_t ldb, float* c, size_t ldc, size_t depth, ptrdiff_t ahead) {
  constexpr int width = Simd::width;
  F sum[n_rows][n_vectors];
  for (int r = 0; r < n_rows; r++)
    for (int v = 0; v < n_vectors; v++) sum[r][v] = add ? Simd::load(c + size_t(r) * ldc + v * width) : Simd::zero();
  for (size_t k = 0; k < depth; k++) {
    F value[n_vectors];
    for (int v = 0; v < n_vectors; v++) {
      value[v] = Simd::load(b + k * ldb + v * width);
      if (ahead && v * width * sizeof(T) % 64 == 0)
        Simd::prefetch(reinterpret_cast<const char*>(b + k * ldb + v * width) + ahead);
    }
    for (int r = 0; r < n_rows; r++) {
      const F factor = Simd::all(a[size_t(r) * lda + k]);
      for (int v = 0; v < n_vectors; v++) sum[r][v] = Simd::fma(factor, value[v], sum[r][v]);
    }
  }
  for (int r = 0; r < n_rows; r++)
    for (int v = 0; v < n_vectors; v++) Simd::store(c + size_t(r) * ldc + v * width, sum[r][v]);
}

// Calls multiply_block for at most as many rows as n_rows.
template <int n_rows, int n_vectors, bool add, class T, class... Rest>
void multiply_rows(size_t n, Rest... rest) {
  if constexpr (n_rows > 1) {
    if (n < size_t(n_rows)) return multiply_rows<n_rows - 1, n_vectors, add, T>(n, rest...);
  }
  multiply_block<n_rows, n_vectors, add, T>(rest...);
}

// The same for any number of rows, and n_columns rounded up to whole vectors.
template <bool add, class T>
void multiply(const float* a, size_t lda, const T* b, size_t ldb, float* c, size_t ldc, size_t n_rows, size_t n_columns,
              size_t depth, ptrdiff_t ahead) {
  constexpr size_t width = Simd::width;
  for (size_t r = 0; r < n_rows; r += Simd::max_rows, ahead = 0) {
    const size_t n = n_rows - r < size_t(Simd::max_rows) ? n_rows - r : size_t(Simd::max_rows);
    const float* rows = a + r * lda;
    float* out = c + r * ldc;
    size_t i = 0;
    for (; i + width < n_columns; i += 2 * width)
      multiply_rows<Simd::max_rows, 2, add, T>(n, rows, lda, b + i, ldb, out + i, ldc, depth, ahead);
    if (i < n_columns) multiply_rows<Simd::max_rows, 1, add, T>(n, rows, lda, b + i, ldb, out + i, ldc, depth, ahead);
  }
}

// Which tokens of a block a row sees: [first, last), empty if last <= first.
struct Seen {
  int64_t first, last;
};

inline Seen seen_by(const AttentionStep& s, int64_t position, size_t block) {
  const int64_t start = int64_t(block * kv_block), first = s.window ? position - s.window + 1 - start : 0;
  const int64_t last = position + 1 - start;
  return {first > 0 ? first : 0, last < int64_t(kv_block) ? last : int64_t(kv_block)};
}

// Scores of a row become weights; m, the sum of weights l (a vector) and the sums o follow a new largest score.
inline void weigh(float* scores, float softcap, Seen seen, float& m, float* l, float* o, size_t n_sums) {
  constexpr size_t width = Simd::width;
  if (seen.last <= seen.first) {
    for (size_t i = 0; i < kv_block; i += width) Simd::store(scores + i, Simd::zero());
    return;
  }
  if (softcap != 0)
    for (size_t i = 0; i < kv_block; i += width)
      Simd::store(scores + i, Simd::mul(Simd::all(softcap), tanh(Simd::load(scores + i))));
  for (int64_t i = 0; i < seen.first; i++) scores[i] = -infinity;
  for (int64_t i = seen.last; i < int64_t(kv_block); i++) scores[i] = -infinity;
  F top = Simd::load(scores);
  for (size_t i = width; i < kv_block; i += width) top = Simd::max(Simd::load(scores + i), top);
  const float most = Simd::max_of(top);
  if (most > m) {
    const F factor = Simd::all(__builtin_expf(m - most));
    m = most;
    Simd::store(l, Simd::mul(factor, Simd::load(l)));
    for (size_t i = 0; i < n_sums; i += width) Simd::store(o + i, Simd::mul(factor, Simd::load(o + i)));
  }
  F total = Simd::load(l);
  for (size_t i = 0; i < kv_block; i += width) {
    const F weight = exp(Simd::sub(Simd::load(scores + i), Simd::all(m)));
    Simd::store(scores + i, weight);
    total = Simd::add(total, weight);
  }
  Simd::store(l, total);
}

void attend(const AttentionStep& s, const AttentionItem& item, float* memory) {
  const size_t n_k = s.k.n_dim, n_v = s.v.n_dim, stride = sums_stride(n_v), n_rows = item.n_tokens * item.n_heads;
  float* q = memory;                                // [n_rows][n_k]
  float* scores = q + round_up(n_rows * n_k, 16);   // [n_rows][kv_block]
  float* l = scores + n_rows * kv_block;            // [n_rows][16]
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

  // Where several passes over a tile are needed, it is converted once.
  const bool wide = n_rows > size_t(Simd::max_rows);
  for (size_t block = item.first_block; block < item.last_block; block++) {
    const uint8_t* k_tile = s.k.tile(size_t(item.table[block]), item.kv_head);
    const uint8_t* v_tile = s.v.tile(size_t(item.table[block]), item.kv_head);
    const size_t next = size_t(item.table[block + 1 < item.last_block ? block + 1 : block]);
    const ptrdiff_t k_ahead = s.k.tile(next, item.kv_head) - k_tile, v_ahead = s.v.tile(next, item.kv_head) - v_tile;

    const auto score = [&](const auto* b, ptrdiff_t ahead) {
      multiply<false>(q, n_k, b, kv_block, scores, kv_block, n_rows, kv_block, n_k, ahead);
    };
    if (s.k.type == CacheType::f32) {
      score(reinterpret_cast<const float*>(k_tile), k_ahead);
    } else if (s.k.type == CacheType::f16 && !wide) {
      score(reinterpret_cast<const Half*>(k_tile), k_ahead);
    } else if (s.k.type == CacheType::bf16 && !wide) {
      score(reinterpret_cast<const Bf16*>(k_tile), k_ahead);
    } else {
      expand_keys(s.k, k_tile, keys, k_ahead);
      score(keys, 0);
    }

    size_t first = kv_block, last = 0;
    for (size_t r = 0; r < n_rows; r++) {
      const Seen seen = seen_by(s, item.position + int64_t(r / item.n_heads), block);
      weigh(scores + r * kv_block, s.softcap, seen, m[r], l + r * 16, o + r * stride, n_v);
      if (seen.last <= seen.first) continue;
      first = size_t(seen.first) < first ? size_t(seen.first) : first;
      last = size_t(seen.last) > last ? size_t(seen.last) : last;
    }
    if (last <= first) continue;

    const auto mix = [&](const auto* b, size_t ldb, ptrdiff_t ahead) {
      multiply<true>(scores + first, kv_block, b + first * ldb, ldb, o, stride, n_rows, n_v, last - first, ahead);
    };
    if (s.v.type == CacheType::f32) {
      mix(reinterpret_cast<const float*>(v_tile), n_v, v_ahead);
    } else if (s.v.type == CacheType::f16 && !wide) {
      mix(reinterpret_cast<const Half*>(v_tile), n_v, v_ahead);
    } else if (s.v.type == CacheType::bf16 && !wide) {
      mix(reinterpret_cast<const Bf16*>(v_tile), n_v, v_ahead);
    } else {
      expand_values(s.v, v_tile, first, last, values, stride, v_ahead);
      mix(values, stride, 0);
    }
  }
  float* total = m + round_up(n_rows, 16);
  for (size_t r = 0; r < n_rows; r++) total[r] = Simd::sum(Simd::load(l + r * 16));
}

void combine(const AttentionStep& s, const AttentionItem* items, size_t first, size_t last) {
  const AttentionItem& item = items[0];
  const size_t n_v = s.v.n_dim, stride = sums_stride(n_v), n_rows = item.n_tokens * item.n_heads;
  for (size_t r = first; r < last; r++) {
    const size_t head = size_t(item.heads[r % item.n_heads]);
    const float sink = s.sinks ? s.sinks[head] : -infinity;
    float top = sink;
    for (size_t p = 0; p < item.n_parts; p++) top = items[p].partial[r] > top ? items[p].partial[r] : top;
    float total = s.sinks ? __builtin_expf(sink - top) : 0;
    for (size_t p = 0; p < item.n_parts; p++) {
      const float* m = items[p].partial;
      total += m[round_up(n_rows, 16) + r] * __builtin_expf(m[r] - top);
    }
    float* out = s.out + ((item.token + r / item.n_heads) * s.n_head + head) * n_v;
    for (size_t i = 0; i < n_v; i += Simd::width) {
      F sum = Simd::zero();
      for (size_t p = 0; p < item.n_parts; p++) {
        const float* m = items[p].partial;
        const F factor = Simd::all(__builtin_expf(m[r] - top) / total);
        sum = Simd::fma(factor, Simd::load(m + 2 * round_up(n_rows, 16) + r * stride + i), sum);
      }
      Simd::store(out + i, sum, n_v - i < size_t(Simd::width) ? n_v - i : size_t(Simd::width));
    }
  }
}

constexpr AttentionKernels attention_kernels{store_keys, store_values, attend, combine};

}  // namespace
}  // namespace mpillama
