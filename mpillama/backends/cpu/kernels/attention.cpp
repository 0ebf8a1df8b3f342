// How attention is divided into items of work.
//
// The queries of a sequence are cut into tiles of tokens, and for each KV head the tokens that a tile sees into parts. How
// many there are depends on the sequence alone, so that the same sums are computed in the same order by any number of
// threads: a sequence of few queries has many parts, one of many queries has many tiles.
#include "attention.h"

#include <algorithm>
#include <atomic>
#include <stdexcept>
#include <vector>

#include "attention_cache.h"
#include "elementwise.h"

namespace mpillama {
namespace {

constexpr size_t blocks_of_part = 8;      // of a sequence that has one tile
constexpr size_t elements_to_store = 8192, elements_to_rotate = 16384;  // that are worth a thread's while

const AttentionKernels& kernels_of(Level level) {
#if MPILLAMA_X86
#if MPILLAMA_AMX
  if (level == Level::amx) return amx_attention;
#endif
  if (level >= Level::avx512) return avx512_attention;
  if (level == Level::avx2) return avx2_attention;
#elif MPILLAMA_ARM
#if MPILLAMA_SVE512
  if (level == Level::sve512) return sve512_attention;
#endif
  if (level >= Level::neon) return neon_attention;
#endif
  (void)level;
  return scalar_attention;
}

size_t checked_bytes(size_t n_blocks, size_t n_heads, size_t n_dim, CacheType type) {
  const bool in_blocks = type == CacheType::q8_0 || type == CacheType::q4_0;
  if (n_dim == 0 || (in_blocks && n_dim % 32)) throw std::invalid_argument("the size of the heads does not fit the type");
  return n_blocks * n_heads * tile_bytes(type, n_dim);
}

void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// Tokens [token, token + n) of the step lie in one KV block, from its token `first` on.
struct Run {
  size_t token, n, first, block;
};

std::vector<Run> runs_of(const KVCache& cache, const AttentionCall& c) {
  std::vector<Run> runs;
  size_t token = 0;
  for (size_t s = 0; s < c.n_seqs; s++) {
    check(c.seq_lens[s] >= 0 && size_t(c.seq_lens[s]) <= c.n_tokens - token, "seq_lens and tokens do not fit together");
    const int32_t* table = c.tables + s * c.table_width;
    const size_t end = token + size_t(c.seq_lens[s]);
    if (token == end) continue;
    const int32_t last = c.positions[end - 1];
    check(last >= 0 && size_t(last) / kv_block < c.table_width, "a position has no KV block");
    const int64_t oldest = c.window ? std::max<int64_t>(0, c.positions[token] - c.window + 1) : 0;
    for (size_t b = size_t(oldest) / kv_block; b <= size_t(last) / kv_block; b++)
      check(table[b] >= 0 && size_t(table[b]) < cache.n_blocks, "a KV block is out of range");
    for (size_t i = token + 1; i < end; i++) check(c.positions[i] == c.positions[i - 1] + 1, "positions have gaps");
    check(c.positions[token] >= 0, "a position is negative");
    while (token < end) {
      const size_t position = size_t(c.positions[token]), first = position % kv_block;
      const size_t n = std::min(kv_block - first, end - token);
      runs.push_back({token, n, first, size_t(table[position / kv_block])});
      token += n;
    }
  }
  check(token == c.n_tokens, "seq_lens and tokens do not fit together");
  return runs;
}

void store(Pool& pool, const AttentionKernels& kernels, const Tiles& k, const Tiles& v, const AttentionCall& c,
           const std::vector<Run>& runs) {
  const size_t n = runs.size() * k.n_heads, elements = c.n_tokens * k.n_heads * (k.n_dim + v.n_dim);
  pool.parallel_for(n, n * elements_to_store / std::max<size_t>(1, elements), [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) {
      const Run& run = runs[i / k.n_heads];
      const size_t head = i % k.n_heads, row = run.token * k.n_heads + head;
      kernels.store_keys(k, k.tile(run.block, head), run.first, c.k + row * k.n_dim, run.n, k.n_heads * k.n_dim);
      kernels.store_values(v, v.tile(run.block, head), run.first, c.v + row * v.n_dim, run.n, v.n_heads * v.n_dim);
    }
  });
}

// Query heads sorted by the KV head that they read; those of KV head g are [begin[g], begin[g + 1]).
struct HeadGroups {
  std::vector<int32_t> heads, begin;

  HeadGroups(const AttentionCall& c, size_t n_heads_kv) : heads(c.n_head), begin(n_heads_kv + 1) {
    for (size_t h = 0; h < c.n_head; h++) {
      check(c.kv_heads[h] >= 0 && size_t(c.kv_heads[h]) < n_heads_kv, "a KV head is out of range");
      begin[size_t(c.kv_heads[h]) + 1]++;
    }
    for (size_t g = 0; g < n_heads_kv; g++) begin[g + 1] += begin[g];
    std::vector<int32_t> at(begin.begin(), begin.end() - 1);
    for (size_t h = 0; h < c.n_head; h++) heads[size_t(at[size_t(c.kv_heads[h])]++)] = int32_t(h);
  }
};

// The items of a sequence; those that share their rows follow each other.
void add_items(const AttentionCall& c, const HeadGroups& groups, size_t token, size_t n_tokens, const int32_t* table,
               size_t item_rows, std::vector<AttentionItem>& items) {
  for (size_t g = 0; g + 1 < groups.begin.size(); g++) {
    const size_t n_heads = size_t(groups.begin[g + 1] - groups.begin[g]);
    if (!n_heads) continue;
    const size_t step = std::max<size_t>(1, item_rows / n_heads), n_tiles = (n_tokens + step - 1) / step;
    // The last tiles see the most tokens: they begin first, so that no thread is left with one at the end.
    for (size_t tile = n_tiles; tile-- > 0;) {
      AttentionItem item{};
      item.token = token + tile * step;
      item.n_tokens = std::min(step, token + n_tokens - item.token);
      item.position = c.positions[item.token];
      item.table = table;
      item.heads = groups.heads.data() + groups.begin[g];
      item.n_heads = n_heads;
      item.kv_head = g;
      const int64_t oldest = c.window ? std::max<int64_t>(0, item.position - c.window + 1) : 0;
      const size_t begin = size_t(oldest) / kv_block, end = (size_t(item.position) + item.n_tokens - 1) / kv_block + 1;
      const size_t part = blocks_of_part * n_tiles;
      item.n_parts = (end - begin + part - 1) / part;
      for (size_t first = begin; first < end; first += part) {
        item.first_block = first;
        item.last_block = std::min(end, first + part);
        items.push_back(item);
        item.n_parts = 0;
      }
    }
  }
}

}  // namespace

CacheType cache_type(const std::string& name) {
  if (name == "f32") return CacheType::f32;
  if (name == "f16") return CacheType::f16;
  if (name == "bf16") return CacheType::bf16;
  if (name == "q8_0") return CacheType::q8_0;
  if (name == "q4_0") return CacheType::q4_0;
  throw std::invalid_argument("there is no KV cache of type " + name);
}

KVCache::KVCache(size_t n_blocks, size_t n_heads, size_t n_k, size_t n_v, CacheType type_k, CacheType type_v)
    : n_blocks(n_blocks),
      k_bytes_(checked_bytes(n_blocks, n_heads, n_k, type_k)),
      v_bytes_(checked_bytes(n_blocks, n_heads, n_v, type_v)),
      k_pages_(k_bytes_ + tile_slack),
      v_pages_(v_bytes_ + tile_slack),
      k_{type_k, n_k, n_heads, k_pages_.data()},
      v_{type_v, n_v, n_heads, v_pages_.data()} {}

namespace {

// The call with q and k rotated, in memory of the pool.
AttentionCall rotated(Pool& pool, const AttentionCall& c, size_t n_heads_kv, size_t n_k) {
  if (!c.cos) return c;
  const size_t n_q = c.n_tokens * c.n_head * n_k, n_heads = c.n_head + n_heads_kv;
  float* q = static_cast<float*>(pool.scratch(2).get((n_q + c.n_tokens * n_heads_kv * n_k) * sizeof(float)));
  float* k = q + n_q;
  const auto rope = elementwise_kernels_of(pool.level()).rope;
  pool.parallel_for(c.n_tokens, elements_to_rotate / std::max<size_t>(1, n_heads * n_k), [&](size_t begin, size_t end) {
    for (size_t token = begin; token < end; token++) {
      const float *cos = c.cos + token * c.n_rot, *sin = c.sin + token * c.n_rot;
      const auto heads = [&](const float* from, float* to, size_t n) {
        for (size_t i = token * n * n_k; i < (token + 1) * n * n_k; i += n_k)
          rope(from + i, cos, sin, c.n_rot, c.neox, to + i, n_k);
      };
      heads(c.q, q, c.n_head);
      heads(c.k, k, n_heads_kv);
    }
  });
  AttentionCall call = c;
  call.q = q;
  call.k = k;
  return call;
}

}  // namespace

void attention(Pool& pool, const KVCache& cache, const AttentionCall& call) {
  const auto turn = pool.lock();
  const AttentionKernels& kernels = kernels_of(pool.level());
  const Tiles &k = cache.k(), &v = cache.v();
  const HeadGroups groups(call, k.n_heads);
  const std::vector<Run> runs = runs_of(cache, call);
  const AttentionCall c = rotated(pool, call, k.n_heads, k.n_dim);
  store(pool, kernels, k, v, c, runs);
  const AttentionStep step{c.q, c.sinks, c.out, c.n_head, k, v, c.scale, c.softcap, c.window};

  std::vector<AttentionItem> items;
  for (size_t s = 0, token = 0; s < c.n_seqs; token += size_t(c.seq_lens[s]), s++)
    add_items(c, groups, token, size_t(c.seq_lens[s]), c.tables + s * c.table_width, kernels.item_rows, items);

  // Working memory of each thread, with the partial result of an item that has its rows for itself; then the others'.
  size_t most_rows = 0, shared = 0;
  std::vector<size_t> split;
  const auto is_split = [&](size_t i) { return items[i].n_parts != 1; };
  const auto rows_of = [](const AttentionItem& item) { return item.n_tokens * item.n_heads; };
  for (size_t i = 0; i < items.size(); i++) {
    most_rows = std::max(most_rows, rows_of(items[i]));
    if (is_split(i)) shared += partial_floats(rows_of(items[i]), v.n_dim);
    if (items[i].n_parts > 1) split.push_back(i);
  }
  const size_t work = attention_floats(most_rows, k.n_dim, v.n_dim);
  const size_t own = round_up(work + partial_floats(most_rows, v.n_dim), 16);
  float* memory = static_cast<float*>(pool.scratch(3).get((own * size_t(pool.size()) + shared) * sizeof(float)));
  float* partial = memory + own * size_t(pool.size());
  for (size_t i = 0; i < items.size(); i++) {
    if (!is_split(i)) continue;
    items[i].partial = partial;
    partial += partial_floats(rows_of(items[i]), v.n_dim);
  }

  std::atomic<size_t> next{0};
  const auto attend = [&](int thread) {
    float* mine = memory + own * size_t(thread);
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items.size();) {
      if (!is_split(i)) items[i].partial = mine + work;
      kernels.attend(step, items[i], mine);
      if (!is_split(i)) kernels.combine(step, &items[i], 0, rows_of(items[i]));
    }
  };
  if (items.size() > 1) {
    pool.run(attend);
  } else {
    attend(0);
  }
  pool.parallel_for(split.size(), 1, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) kernels.combine(step, &items[split[i]], 0, rows_of(items[split[i]]));
  });
}

}  // namespace mpillama
