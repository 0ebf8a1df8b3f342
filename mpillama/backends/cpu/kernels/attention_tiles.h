// Tiles of the KV cache: writing them, and reading quantized ones. To be included after a Simd.
#pragma once
#include <cstring>

namespace mpillama {
namespace {

// 32 floats as int8 with one factor, rounded as the Q8_0 format of GGUF is: halves away from 0.
inline Half quantize_8(const float* x, int8_t* codes) {
  F top = Simd::zero();
  for (int i = 0; i < 32; i += Simd::width) top = Simd::max(top, Simd::abs(Simd::load(x + i)));
  const float factor = Simd::max_of(top) / 127.0f, inverse = factor > 0 ? 1.0f / factor : 0.0f;
  for (int i = 0; i < 32; i++) {
    // What is not finite has no integer.
    const float y = x[i] * inverse, rounded = y + (y < 0 ? -0.5f : 0.5f);
    codes[i] = int8_t(rounded > -128.0f && rounded < 128.0f ? int(rounded) : 0);
  }
  return Simd::to_half(factor);
}

// 32 floats as codes 0..15, of which 8 is subtracted, with one factor; the largest value becomes -8, as in Q4_0 of GGUF.
inline Half quantize_4(const float* x, uint8_t* bytes) {
  float most = 0;
  for (int i = 0; i < 32; i++) most = __builtin_fabsf(x[i]) > __builtin_fabsf(most) ? x[i] : most;
  const float factor = most / -8.0f, inverse = factor != 0 ? 1.0f / factor : 0.0f;
  const auto code = [&](int i) {
    const float c = x[i] * inverse + 8.5f;
    return c >= 16.0f ? 15 : c > 0.0f ? int(c) : 0;
  };
  for (int i = 0; i < 16; i++) bytes[i] = uint8_t(code(i) | code(i + 16) << 4);
  return Simd::to_half(factor);
}

template <class T> void convert(const float* x, T* out) {
  for (int i = 0; i < 32; i += Simd::width) Simd::store(out + i, Simd::load(x + i));
}

// Puts n bytes-or-wider elements into a column of a tile.
template <class T> void scatter(const T* x, size_t n, uint8_t* tile, size_t row, size_t token) {
  T* column = reinterpret_cast<T*>(tile) + row * kv_block + token;
  for (size_t i = 0; i < n; i++) column[i * kv_block] = x[i];
}

// 32 elements of a token, the last of which may be beyond its end.
struct Chunk {
  alignas(64) float x[32];
  size_t n;

  Chunk(const float* row, size_t at, size_t n_dim) : n(n_dim - at < 32 ? n_dim - at : 32) {
    if (n < 32) std::memset(x, 0, sizeof x);
    std::memcpy(x, row + at, n * sizeof(float));
  }
};

inline void store_key(const Tiles& t, uint8_t* tile, size_t token, const float* row) {
  for (size_t at = 0; at < t.n_dim; at += 32) {
    const Chunk c(row, at, t.n_dim);
    Half halves[32];
    Bf16 upper[32];
    int8_t codes[32];
    uint8_t nibbles[16];
    switch (t.type) {
      case CacheType::f32: scatter(c.x, c.n, tile, at, token); break;
      case CacheType::f16:
        convert(c.x, halves);
        scatter(halves, c.n, tile, at, token);
        break;
      case CacheType::bf16:
        convert(c.x, upper);
        scatter(upper, c.n, tile, at, token);
        break;
      case CacheType::q8_0: {
        const Half factor = quantize_8(c.x, codes);
        scatter(codes, 32, tile, at, token);
        scatter(&factor, 1, tile + t.n_dim * kv_block, at / 32, token);
        break;
      }
      case CacheType::q4_0: {
        const Half factor = quantize_4(c.x, nibbles);
        scatter(nibbles, 16, tile, at / 2, token);
        scatter(&factor, 1, tile + t.n_dim / 2 * kv_block, at / 32, token);
        break;
      }
    }
  }
}

inline void store_value(const Tiles& t, uint8_t* tile, size_t token, const float* row) {
  const size_t n = t.n_dim;
  if (t.type == CacheType::f32) {
    std::memcpy(tile + token * n * 4, row, n * 4);
    return;
  }
  for (size_t at = 0; at < n; at += 32) {
    const Chunk c(row, at, n);
    Half halves[32];
    Bf16 upper[32];
    const auto put_factor = [&](size_t codes_bytes, Half factor) {
      std::memcpy(tile + codes_bytes + (at / 32 * kv_block + token) * sizeof factor, &factor, sizeof factor);
    };
    switch (t.type) {
      case CacheType::f32: break;
      case CacheType::f16:
        convert(c.x, halves);
        std::memcpy(tile + (token * n + at) * 2, halves, c.n * 2);
        break;
      case CacheType::bf16:
        convert(c.x, upper);
        std::memcpy(tile + (token * n + at) * 2, upper, c.n * 2);
        break;
      case CacheType::q8_0:
        put_factor(kv_block * n, quantize_8(c.x, reinterpret_cast<int8_t*>(tile) + token * n + at));
        break;
      case CacheType::q4_0:
        put_factor(kv_block * n / 2, quantize_4(c.x, tile + (token * n + at) / 2));
        break;
    }
  }
}

void store_keys(const Tiles& t, uint8_t* tile, size_t first, const float* x, size_t n, size_t stride) {
  for (size_t i = 0; i < n; i++) store_key(t, tile, first + i, x + i * stride);
}

void store_values(const Tiles& t, uint8_t* tile, size_t first, const float* x, size_t n, size_t stride) {
  for (size_t i = 0; i < n; i++) store_value(t, tile, first + i, x + i * stride);
}

// Copies n_rows rows of n floats as floats, `stride` apart; reads whole vectors.
template <class T> void expand(const T* x, size_t n_rows, size_t n, float* out, size_t stride) {
  for (size_t r = 0; r < n_rows; r++)
    for (size_t i = 0; i < n; i += Simd::width) Simd::store(out + r * stride + i, Simd::load(x + r * n + i));
}

// A tile of keys as floats [n_dim][kv_block].
inline void expand_keys(const Tiles& t, const uint8_t* tile, float* out) {
  const size_t n = t.n_dim;
  const bool bytes = t.type == CacheType::q8_0;
  const Half* factors = reinterpret_cast<const Half*>(tile + (bytes ? n : n / 2) * kv_block);
  switch (t.type) {
    case CacheType::f32: expand(reinterpret_cast<const float*>(tile), n, kv_block, out, kv_block); return;
    case CacheType::f16: expand(reinterpret_cast<const Half*>(tile), n, kv_block, out, kv_block); return;
    case CacheType::bf16: expand(reinterpret_cast<const Bf16*>(tile), n, kv_block, out, kv_block); return;
    case CacheType::q8_0:
    case CacheType::q4_0: break;
  }
  for (size_t b = 0; b < n / 32; b++)
    for (size_t token = 0; token < kv_block; token += Simd::width) {
      const F factor = Simd::load(factors + b * kv_block + token);
      for (size_t i = 0; i < (bytes ? 32 : 16); i++) {
        const uint8_t* codes = tile + (b * (bytes ? 32 : 16) + i) * kv_block + token;
        float* row = out + (b * 32 + i) * kv_block + token;
        if (bytes) {
          Simd::store(row, Simd::mul(factor, Simd::load(reinterpret_cast<const int8_t*>(codes))));
        } else {
          Simd::store(row, Simd::mul(factor, Simd::load_nibbles<0>(codes)));
          Simd::store(row + 16 * kv_block, Simd::mul(factor, Simd::load_nibbles<4>(codes)));
        }
      }
    }
}

// A tile of values as floats [kv_block][stride].
inline void expand_values(const Tiles& t, const uint8_t* tile, float* out, size_t stride) {
  const size_t n = t.n_dim;
  switch (t.type) {
    case CacheType::f32: expand(reinterpret_cast<const float*>(tile), kv_block, n, out, stride); return;
    case CacheType::f16: expand(reinterpret_cast<const Half*>(tile), kv_block, n, out, stride); return;
    case CacheType::bf16: expand(reinterpret_cast<const Bf16*>(tile), kv_block, n, out, stride); return;
    case CacheType::q8_0:
    case CacheType::q4_0: break;
  }
  const bool bytes = t.type == CacheType::q8_0;
  const size_t row_bytes = bytes ? n : n / 2, block_bytes = bytes ? 32 : 16;
  const Half* factors = reinterpret_cast<const Half*>(tile + row_bytes * kv_block);
  for (size_t token = 0; token < kv_block; token++, out += stride)
    for (size_t b = 0; b < n / 32; b++) {
      const F factor = Simd::all(Simd::to_float(factors[b * kv_block + token]));
      const uint8_t* codes = tile + token * row_bytes + b * block_bytes;
      for (size_t i = 0; i < block_bytes; i += Simd::width) {
        float* at = out + 32 * b + i;
        if (bytes) {
          Simd::store(at, Simd::mul(factor, Simd::load(reinterpret_cast<const int8_t*>(codes + i))));
        } else {
          Simd::store(at, Simd::mul(factor, Simd::load_nibbles<0>(codes + i)));
          Simd::store(at + 16, Simd::mul(factor, Simd::load_nibbles<4>(codes + i)));
        }
      }
    }
}

// Tiles that will be needed next, to be fetched into the cache in pieces while others are computed with: all at once they
// would be waited for.
struct Ahead {
  struct Tile { const uint8_t* data; size_t n_bytes; };
  Tile tiles[2 * attention_span / kv_block];
  size_t n_tiles, piece;  // bytes
  size_t tile, at;

  void fetch() {
    if (tile == n_tiles) return;
    const Tile& t = tiles[tile];
    const size_t end = at + piece < t.n_bytes ? at + piece : t.n_bytes;
    for (; at < end; at += 64) Simd::prefetch(t.data + at);
    if (end == t.n_bytes) tile++, at = 0;
  }
};

}  // namespace
}  // namespace mpillama
