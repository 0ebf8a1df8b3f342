// The KV cache of one block of the model, and the op on it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

#include "attention.h"
#include "packed.h"
#include "pool.h"

namespace mpillama {

// f32, f16, bf16, q8_0 or q4_0; throws std::invalid_argument for others.
CacheType cache_type(const std::string& name);

class KVCache {
 public:
  // Types in blocks of 32 need heads of whole blocks; throws std::invalid_argument otherwise. Memory that was not
  // written yet is not resident.
  KVCache(size_t n_blocks, size_t n_heads, size_t n_k, size_t n_v, CacheType type_k, CacheType type_v);

  const size_t n_blocks;

  const Tiles& k() const { return k_; }
  const Tiles& v() const { return v_; }
  size_t bytes() const { return k_bytes_ + v_bytes_; }

 private:
  size_t k_bytes_, v_bytes_;
  Pages k_pages_, v_pages_;
  Tiles k_, v_;
};

// The tokens of a step, sequence after sequence; see `Backend.attention` in base.py.
struct AttentionCall {
  const float *q, *k, *v;     // [n_tokens] [n_head][n_k], [n_heads_kv][n_k], [n_heads_kv][n_v]
  const float* sinks;         // [n_head] or null
  float* out;                 // [n_tokens][n_head][n_v]
  size_t n_tokens, n_head;
  const int32_t *positions, *seq_lens, *tables;  // [n_tokens], [n_seqs], [n_seqs][table_width]
  size_t n_seqs, table_width;
  const int32_t* kv_heads;    // [n_head]
  float scale, softcap;
  int64_t window;
  // Rotations of q and k to be made first, [n_tokens][n_rot], as in ElementwiseKernels; cos is null if there are none.
  const float *cos, *sin;
  size_t n_rot;
  bool neox;
};

// Stores keys and values, then attends. The result does not depend on the number of threads. Throws
// std::invalid_argument, before anything was stored, if an index is out of range.
void attention(Pool& pool, const KVCache& cache, const AttentionCall& call);

}  // namespace mpillama
