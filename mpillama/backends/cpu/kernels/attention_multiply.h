// Products of a few rows with tiles of the KV cache, read in whatever form they have. To be included after a Simd.
#pragma once
#include <utility>

#include "attention_tiles.h"

namespace mpillama {
namespace {

template <bool b> struct Constant { static constexpr bool value = b; };
using yes = Constant<true>;
using no = Constant<false>;

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

// multiply_block for 1, 2 ... rows.
template <int n_vectors, bool add, class T> struct MultiplyBlocks {
  using Function = void (*)(const float*, size_t, const T*, size_t, float*, size_t, size_t, ptrdiff_t);
  Function by_rows[Simd::max_rows];

  template <int... i> static constexpr MultiplyBlocks make(std::integer_sequence<int, i...>) {
    return {{multiply_block<i + 1, n_vectors, add, T>...}};
  }
};
template <int n_vectors, bool add, class T>
constexpr auto multiply_blocks = MultiplyBlocks<n_vectors, add, T>::make(std::make_integer_sequence<int, Simd::max_rows>());

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
      multiply_blocks<2, add, T>.by_rows[n - 1](rows, lda, b + i, ldb, out + i, ldc, depth, ahead);
    if (i < n_columns) multiply_blocks<1, add, T>.by_rows[n - 1](rows, lda, b + i, ldb, out + i, ldc, depth, ahead);
  }
}

// scores[n_rows][score_stride] = q[n_rows][n_dim] times a tile of keys; temporary: n_rows * kv_block floats.
inline void score_tile(const Tiles& t, const uint8_t* tile, const float* q, float* scores, size_t score_stride, size_t n_rows,
                       float* temporary, ptrdiff_t ahead) {
  const size_t n = t.n_dim;
  const auto whole = [&](const auto* keys) {
    multiply<false>(q, n, keys, kv_block, scores, score_stride, n_rows, kv_block, n, ahead);
  };
  switch (t.type) {
    case CacheType::f32: whole(reinterpret_cast<const float*>(tile)); return;
    case CacheType::f16: whole(reinterpret_cast<const Half*>(tile)); return;
    case CacheType::bf16: whole(reinterpret_cast<const Bf16*>(tile)); return;
    case CacheType::q8_0:
    case CacheType::q4_0: break;
  }
  // The product of each 32 elements, times their factors.
  const bool bytes = t.type == CacheType::q8_0;
  const Half* factors = reinterpret_cast<const Half*>(tile + (bytes ? n : n / 2) * kv_block);
  for (size_t at = 0; at < n; at += 32, factors += kv_block) {
    const auto part = [&](const auto* codes, auto add, size_t offset, size_t depth) {
      multiply<add.value>(q + at + offset, n, codes, kv_block, temporary, kv_block, n_rows, kv_block, depth, ahead);
    };
    if (bytes) {
      part(reinterpret_cast<const int8_t*>(tile) + at * kv_block, no{}, 0, 32);
    } else {
      part(reinterpret_cast<const LowNibble*>(tile) + at / 2 * kv_block, no{}, 0, 16);
      part(reinterpret_cast<const HighNibble*>(tile) + at / 2 * kv_block, yes{}, 16, 16);
    }
    for (size_t i = 0; i < kv_block; i += Simd::width) {
      const F factor = Simd::load(factors + i);
      for (size_t r = 0; r < n_rows; r++) {
        float* score = scores + r * score_stride + i;
        const F sum = at ? Simd::load(score) : Simd::zero();
        Simd::store(score, Simd::fma(factor, Simd::load(temporary + r * kv_block + i), sum));
      }
    }
  }
}

// sums[n_rows][sum_stride] += weights[n_rows][weight_stride], of tokens [first, last), times a tile of values; temporary:
// n_rows * kv_block floats.
inline void mix_tile(const Tiles& t, const uint8_t* tile, size_t first, size_t last, const float* weights,
                     size_t weight_stride, float* sums, size_t sum_stride, size_t n_rows, float* temporary, ptrdiff_t ahead) {
  const size_t n = t.n_dim;
  const auto whole = [&](const auto* values) {
    multiply<true>(weights + first, weight_stride, values + first * n, n, sums, sum_stride, n_rows, n, last - first, ahead);
  };
  switch (t.type) {
    case CacheType::f32: whole(reinterpret_cast<const float*>(tile)); return;
    case CacheType::f16: whole(reinterpret_cast<const Half*>(tile)); return;
    case CacheType::bf16: whole(reinterpret_cast<const Bf16*>(tile)); return;
    case CacheType::q8_0:
    case CacheType::q4_0: break;
  }
  // For each 32 elements, the factors of the tokens join the weights.
  const bool bytes = t.type == CacheType::q8_0;
  const size_t row_bytes = bytes ? n : n / 2;
  const Half* factors = reinterpret_cast<const Half*>(tile + row_bytes * kv_block);
  for (size_t at = 0; at < n; at += 32, factors += kv_block) {
    for (size_t i = 0; i < kv_block; i += Simd::width) {
      const F factor = Simd::load(factors + i);
      for (size_t r = 0; r < n_rows; r++)
        Simd::store(temporary + r * kv_block + i, Simd::mul(factor, Simd::load(weights + r * weight_stride + i)));
    }
    const auto part = [&](const auto* values, size_t offset, size_t columns) {
      multiply<true>(temporary + first, kv_block, values + first * row_bytes, row_bytes, sums + at + offset, sum_stride, n_rows,
                     columns, last - first, ahead);
    };
    if (bytes) {
      part(reinterpret_cast<const int8_t*>(tile) + at, 0, 32);
    } else {
      part(reinterpret_cast<const LowNibble*>(tile) + at / 2, 0, 16);
      part(reinterpret_cast<const HighNibble*>(tile) + at / 2, 16, 16);
    }
  }
}

}  // namespace
}  // namespace mpillama
