// Attention over a KV cache in blocks of tokens: data that the driver and the kernels share.
//
// The cache of one kind (keys or values) is [n_blocks][n_heads] tiles, each with the kv_block tokens of one KV head.
// Keys lie with the tokens last, so that a product with a query gives the scores of a vector of tokens:
//   f32, f16, bf16: [n_dim][kv_block]
//   q8_0:           int8 [n_dim][kv_block], then f16 factors [n_dim / 32][kv_block]
//   q4_0:           as q8_0, a byte for elements i and i + 16 of 32: [n_dim / 2][kv_block]
// Values lie with the elements last:
//   f32, f16, bf16: [kv_block][n_dim]
//   q8_0, q4_0:     int8 [kv_block][n_dim], or bytes [kv_block][n_dim / 2], then f16 factors [n_dim / 32][kv_block]
// Kernels read up to a vector past a tile, and throw away what they found there.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpillama {

struct Half { uint16_t bits; };
struct Bf16 { uint16_t bits; };
// One of the two codes of 4 bits in a byte, which mean -8 .. 7.
struct LowNibble { uint8_t bits; };
struct HighNibble { uint8_t bits; };

constexpr size_t kv_block = 32;
constexpr size_t attention_span = 4 * kv_block;  // tokens whose scores exist at one time
constexpr size_t panel_span = 2 * kv_block;      // the same where there are many queries
constexpr size_t panel_rows = 48;                // a multiple of the rows of a panel on each level
constexpr size_t tile_slack = 64;  // bytes that can be read past the last tile

enum class CacheType { f32, f16, bf16, q8_0, q4_0 };

constexpr size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

// Bytes of a tile.
constexpr size_t tile_bytes(CacheType type, size_t n_dim) {
  switch (type) {
    case CacheType::f32: return kv_block * n_dim * 4;
    case CacheType::f16:
    case CacheType::bf16: return kv_block * n_dim * 2;
    case CacheType::q8_0: return kv_block * n_dim / 32 * 34;
    case CacheType::q4_0: return kv_block * n_dim / 32 * 18;
  }
  return 0;
}

// Keys or values of one block of the model.
struct Tiles {
  CacheType type;
  size_t n_dim, n_heads;
  uint8_t* data;

  uint8_t* tile(size_t block, size_t head) const { return data + (block * n_heads + head) * tile_bytes(type, n_dim); }
};

// What all items of a call share.
struct AttentionStep {
  const float* q;             // [n_tokens][n_head][n_k]
  const float* sinks;         // [n_head] or null
  float* out;                 // [n_tokens][n_head][n_v]
  size_t n_head;
  Tiles k, v;
  float scale, softcap;       // softcap 0: none
  int64_t window;             // 0: none
};

// Queries of some tokens, for the heads that read one KV head, against a range of KV blocks. Its rows are tokens times heads.
struct AttentionItem {
  size_t token, n_tokens;     // rows of q
  int64_t position;           // of the first token
  const int32_t* table;       // KV blocks of the sequence
  const int32_t* heads;       // query heads that read kv_head
  size_t n_heads, kv_head;
  size_t first_block, last_block;
  float* partial;             // see partial_floats
  size_t n_parts;             // how many items, one after the other, share these rows; only the first of them has it
};

// Floats of what an item leaves for `combine`: m[n_rows], l[n_rows], sums [n_rows][stride].
// The values so far have the sum o / l, where both o and l are to be multiplied by e^m.
constexpr size_t sums_stride(size_t n_v) { return round_up(n_v, 16); }
constexpr size_t partial_floats(size_t n_rows, size_t n_v) { return 2 * round_up(n_rows, 16) + n_rows * sums_stride(n_v); }

// Floats of working memory for items of at most n_rows rows: what attend_panels and attend_tiles need; attend_rows needs less.
constexpr size_t attention_floats(size_t n_rows, size_t n_k, size_t n_v) {
  const size_t n = round_up(n_rows, 2 * panel_rows), wide_k = round_up(n_k, 32), wide_v = round_up(n_v, 32);
  return n * (wide_k + wide_v + 17) + attention_span * (4 * panel_rows + 2 * (wide_k + wide_v));
}

struct AttentionKernels {
  // Puts n tokens of one head, rows `stride` floats apart, into a tile, from its token `first` on.
  void (*store_keys)(const Tiles&, uint8_t* tile, size_t first, const float* x, size_t n, size_t stride);
  void (*store_values)(const Tiles&, uint8_t* tile, size_t first, const float* x, size_t n, size_t stride);
  // Computes an item's partial result; memory is aligned to 64 bytes.
  void (*attend)(const AttentionStep&, const AttentionItem&, float* memory);
  // Writes rows [first, last) of the tokens of items[0], from the partial results of items[0 .. n_parts), which are used up.
  void (*combine)(const AttentionStep&, const AttentionItem* items, size_t first, size_t last);
  size_t item_rows;  // of an item, if a sequence has so many queries: more share the reading of keys and values
};

extern const AttentionKernels scalar_attention;
#if MPILLAMA_X86
extern const AttentionKernels avx2_attention, avx512_attention;
#if MPILLAMA_AMX
extern const AttentionKernels amx_attention;
#endif
#elif MPILLAMA_ARM
extern const AttentionKernels neon_attention, sve512_attention;
#endif

}  // namespace mpillama
