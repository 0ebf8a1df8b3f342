// Attention over a paged cache of keys of type MPL_K_TYPE and values of type MPL_V_TYPE (numbers of enum ggml_type).
//
// A cache is [KV block][KV head][32 tokens][row]. A thread block has a tile of up to R query rows (tokens of one sequence
// times query heads of one KV head) and a share of the keys. A lane scores one key, then the lanes share out the elements
// of the values; each warp keeps a running maximum and sum (arXiv:2112.05682), which are joined at the end.
#include "codec.cuh"
#include "round.cuh"

#ifndef MPL_PAIRS
#error "define MPL_PAIRS: pairs of value elements of a lane, at least n_v / (2 * MPL_WARP)"
#endif
constexpr int kWarps = 4;
// Less than any score, and yet its differences are numbers.
constexpr float kLeast = -1e30f;

// So many floats, read and written as a whole.
template <int N> struct __align__(N >= 4 ? 16 : 4 * N) Floats { float v[N]; };

// -- rows of one type: bytes, elements one at a time, two at once from a multiple of two (of rows with an even number of them), and
// eight at once from a multiple of eight.
template <int TYPE> struct Row;

template <> struct Row<T_F32> {
  static constexpr int kUnit = 1;
  MPL_INLINE i64 bytes(int n) { return 4 * (i64)n; }
  MPL_INLINE float at(const u8* row, int i) { return ((const float*)row)[i]; }
  MPL_INLINE Floats<2> two(const u8* row, int i) { return *(const Floats<2>*)(row + 4 * i); }
  MPL_INLINE void eight(const u8* row, int i, float* v) {
    const Piece a = *(const Piece*)(row + 4 * i), b = *(const Piece*)(row + 4 * i + 16);
    v[0] = as_float(a.x), v[1] = as_float(a.y), v[2] = as_float(a.z), v[3] = as_float(a.w);
    v[4] = as_float(b.x), v[5] = as_float(b.y), v[6] = as_float(b.z), v[7] = as_float(b.w);
  }
  MPL_INLINE void store(const float* x, u8* row, int i) { ((float*)row)[i] = x[i]; }
};

template <bool BRAIN> struct Row16 {
  static constexpr int kUnit = 1;
  MPL_INLINE i64 bytes(int n) { return 2 * (i64)n; }
  MPL_INLINE float wide(u16 h) { return BRAIN ? bf16_to_float(h) : half_to_float(h); }
  MPL_INLINE float at(const u8* row, int i) { return wide(((const u16*)row)[i]); }
  MPL_INLINE Floats<2> two(const u8* row, int i) {
    const u32 both = *(const u32*)(row + 2 * i);
    return {wide((u16)both), wide((u16)(both >> 16))};
  }
  MPL_INLINE void eight(const u8* row, int i, float* v) {
    const Piece a = *(const Piece*)(row + 2 * i);
    const u32 words[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int j = 0; j < 4; j++) v[2 * j] = wide((u16)words[j]), v[2 * j + 1] = wide((u16)(words[j] >> 16));
  }
  MPL_INLINE void store(const float* x, u8* row, int i) { ((u16*)row)[i] = BRAIN ? float_to_bf16(x[i]) : float_to_half(x[i]); }
};
template <> struct Row<T_F16> : Row16<false> {};
template <> struct Row<T_BF16> : Row16<true> {};

template <> struct Row<T_Q8_0> {
  static constexpr int kUnit = 32;
  MPL_INLINE i64 bytes(int n) { return (i64)(n / 32) * 34; }
  MPL_INLINE float at(const u8* row, int i) {
    const u8* b = row + i / 32 * 34;
    return half_at(b) * (float)(i8)b[2 + i % 32];
  }
  MPL_INLINE Floats<2> two(const u8* row, int i) {
    const u8* b = row + i / 32 * 34;
    const float d = half_at(b);
    const u32 both = short_at(b + 2 + i % 32);
    return {d * (float)(i8)both, d * (float)(i8)(both >> 8)};
  }
  MPL_INLINE void eight(const u8* row, int i, float* v) {
    const u8* b = row + i / 32 * 34;
    const float d = half_at(b);
    const u32 low = word<2>(b + 2 + i % 32), high = word<2>(b + 6 + i % 32);
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = d * (float)(i8)(low >> 8 * j), v[j + 4] = d * (float)(i8)(high >> 8 * j);
  }
  MPL_INLINE void store(const float* x, u8* row, int unit) {
    u8* b = row + unit * 34;
    x += unit * 32;
    float top = 0.f;
    for (int i = 0; i < 32; i++) top = fmaxf(top, fabsf(x[i]));
    const float d = top / 127.f, inverse = d > 0.f ? 1.f / d : 0.f;
    *(u16*)b = float_to_half(d);
    for (int i = 0; i < 32; i++) b[2 + i] = (u8)(i8)(int)roundf(x[i] * inverse);
  }
};

template <> struct Row<T_Q4_0> {
  static constexpr int kUnit = 32;
  MPL_INLINE i64 bytes(int n) { return (i64)(n / 32) * 18; }
  MPL_INLINE float at(const u8* row, int i) {
    const u8* b = row + i / 32 * 18;
    return half_at(b) * (float)((b[2 + i % 16] >> i % 32 / 16 * 4 & 15) - 8);
  }
  MPL_INLINE Floats<2> two(const u8* row, int i) {
    const u8* b = row + i / 32 * 18;
    const float d = half_at(b);
    const u32 both = short_at(b + 2 + i % 16) >> i % 32 / 16 * 4;
    return {d * (float)((int)(both & 15) - 8), d * (float)((int)(both >> 8 & 15) - 8)};
  }
  MPL_INLINE void eight(const u8* row, int i, float* v) {
    const u8* b = row + i / 32 * 18;
    const float d = half_at(b);
    const int shift = i % 32 / 16 * 4;
    const u32 low = word<2>(b + 2 + i % 16) >> shift, high = word<2>(b + 6 + i % 16) >> shift;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      v[j] = d * (float)((int)(low >> 8 * j & 15) - 8);
      v[j + 4] = d * (float)((int)(high >> 8 * j & 15) - 8);
    }
  }
  MPL_INLINE void store(const float* x, u8* row, int unit) {
    u8* b = row + unit * 18;
    x += unit * 32;
    float top = 0.f;
    for (int i = 0; i < 32; i++)
      if (fabsf(x[i]) > fabsf(top)) top = x[i];
    const float d = top / -8.f, inverse = d != 0.f ? 1.f / d : 0.f;
    *(u16*)b = float_to_half(d);
    for (int i = 0; i < 16; i++) {
      const int low = min(15, (int)(x[i] * inverse + 8.5f)), high = min(15, (int)(x[i + 16] * inverse + 8.5f));
      b[2 + i] = (u8)(low | high << 4);
    }
  }
};

typedef Row<MPL_K_TYPE> K;
typedef Row<MPL_V_TYPE> V;

// Where a token's row is in a cache: `table` has the KV blocks of its sequence.
MPL_INLINE i64 row_of(const int* table, int position, int n_kv, int head) {
  return ((i64)table[position / 32] * n_kv + head) * 32 + position % 32;
}

// Puts the step's keys and values into their places, and queries into `turned`, if there are such. A warp has a head of one
// token. Biases, each as wide as all heads, are added first, if they are given; then heads of queries and keys are normed where
// there are weights (n_k) for it; then, with `cosines`, the first 2 half elements turn by their token's position: see `rope` of
// elementwise.cu.
extern "C" __global__ void __launch_bounds__(kWarps* MPL_WARP)
    store(const float* q, const float* k, const float* v, const float* bias_q, const float* bias_k, const float* bias_v,
          const float* norm_q, const float* norm_k, float eps, const float* cosines, const float* sines, int neox, int half,
          const int* positions, const int* sequences, const int* tables, int n_table,
          int n_tokens, int n_head, int n_kv, int n_k, int n_v, float* turned, u8* keys, u8* values) {
  MPL_DYN_SHARED(float, rows);
  const int lane = threadIdx.x % MPL_WARP, warp = threadIdx.x / MPL_WARP, n_heads = (turned ? n_head : 0) + 2 * n_kv;
  const i64 id = (i64)blockIdx.x * kWarps + warp, token = id / n_heads;
  if (token >= n_tokens) return;
  int head = (int)(id % n_heads) - 2 * n_kv;
  const bool is_query = head >= 0, is_value = !is_query && head >= -n_kv;
  if (!is_query) head += is_value ? n_kv : 2 * n_kv;
  const int n = is_value ? n_v : n_k;
  const i64 at = (token * (is_query ? n_head : n_kv) + head) * n;
  const float *from = (is_query ? q : is_value ? v : k) + at, *norm = is_query ? norm_q : is_value ? nullptr : norm_k;
  const float* bias = is_query ? bias_q : is_value ? bias_v : bias_k;
  if (bias) bias += head * n;
  float *row = rows + warp * max(n_k, n_v), sum = 0.f;
  for (int i = lane; i < n; i += MPL_WARP) {
    row[i] = from[i] + (bias ? bias[i] : 0.f);
    sum += row[i] * row[i];
  }
  if (norm) {
    const float inverse = 1.f / sqrtf(lanes_sum<MPL_WARP>(sum) / (float)n + eps);
    for (int i = lane; i < n; i += MPL_WARP) row[i] = row[i] * inverse * norm[i];
  }
  __syncwarp();
  if (cosines && !is_value)
    for (int pair = lane; pair < half; pair += MPL_WARP) {
      const int i = neox ? pair : 2 * pair, j = neox ? pair + half : 2 * pair + 1;
      const float c = cosines[token * half + pair], s = sines[token * half + pair], a = row[i], b = row[j];
      row[i] = a * c - b * s;
      row[j] = a * s + b * c;
    }
  __syncwarp();
  if (is_query) {
    for (int i = lane; i < n; i += MPL_WARP) turned[at + i] = row[i];
    return;
  }
  const i64 place = row_of(tables + (i64)sequences[token] * n_table, positions[token], n_kv, head);
  if (is_value)
    for (int unit = lane; unit < n / V::kUnit; unit += MPL_WARP) V::store(row, values + place * V::bytes(n), unit);
  else
    for (int unit = lane; unit < n / K::kUnit; unit += MPL_WARP) K::store(row, keys + place * K::bytes(n), unit);
}
MPL_EXPORT(store)

// Iterations whose loads are under way together: with many rows there are no registers for more.
#ifdef MPL_HIP
template <int R> constexpr int kAtOnce = R < 4 ? 2 : 1;
#else
template <int R> constexpr int kAtOnce = R < 8 ? 4 : 2;
#endif

// Adds the values of tokens `from` to `to` of a KV block, each times the weights p of R rows.
template <int R, bool EVEN>
MPL_INLINE void add_values(float (*acc)[MPL_PAIRS][2], const float* p, const u8* rows, int from, int to, int n_v, int lane) {
#pragma unroll kAtOnce<R>
  for (int token = from; token <= to; token++) {
    const Floats<R> weights = *(const Floats<R>*)(p + token * R);
    const u8* row = rows + token * V::bytes(n_v);
#pragma unroll
    for (int i = 0; i < MPL_PAIRS; i++) {
      const int d = 2 * (i * MPL_WARP + lane);
      if (d >= n_v) break;
      Floats<2> v;
      if (EVEN) v = V::two(row, d);
      else v.v[0] = V::at(row, d), v.v[1] = d + 1 < n_v ? V::at(row, d + 1) : 0.f;
#pragma unroll
      for (int r = 0; r < R; r++) acc[r][i][0] += weights.v[r] * v.v[0], acc[r][i][1] += weights.v[r] * v.v[1];
    }
  }
}

// A warp joins the splits of a row, `step` apart in `part`: maximum, sum, and n_v unfinished sums each. KEEP: into `kept` too.
template <bool KEEP>
MPL_INLINE void join(const float* part, int step, int n_split, int n_v, int lane, const float* sink, float* out, float* kept) {
  float best = sink ? *sink : kLeast, total = 0.f, sum[2 * MPL_PAIRS];
  for (int s = lane; s < n_split; s += MPL_WARP) best = fmaxf(best, fresh(part + (i64)s * step));
  best = lanes_max<MPL_WARP>(best);
#pragma unroll
  for (int i = 0; i < 2 * MPL_PAIRS; i++) sum[i] = 0.f;
  for (int s0 = 0; s0 < n_split; s0 += MPL_WARP) {
    const bool here = s0 + lane < n_split;
    const float* mine = part + (i64)(s0 + lane) * step;
    const float own = here ? expf(fresh(mine) - best) : 0.f;
    if (here) total += fresh(mine + 1) * own;
    const int n = min(MPL_WARP, n_split - s0);
#pragma unroll 4
    for (int j = 0; j < n; j++) {
      const float share = MPL_SHFL(own, j);
      const float* from = part + (i64)(s0 + j) * step + 2;
#pragma unroll
      for (int i = 0; i < 2 * MPL_PAIRS; i++)
        if (lane + i * MPL_WARP < n_v) sum[i] += fresh(from + lane + i * MPL_WARP) * share;
    }
  }
  total = lanes_sum<MPL_WARP>(total) + (sink ? expf(*sink - best) : 0.f);
#pragma unroll
  for (int i = 0; i < 2 * MPL_PAIRS; i++) {
    const int d = lane + i * MPL_WARP;
    if (d >= n_v) break;
    out[d] = sum[i] / total;
    if (KEEP) kept[d] = out[d];
  }
}

// A row of whole sub-blocks, in shared memory, in 8 bits; by n threads, whole warps, of which this is number `id`.
MPL_INLINE void round_row(const float* v, i64 row, int n_v, int id, int n, int* xq, float* xd, float* xs) {
  for (int first = 0; first < n_v / 4; first += n) {
    const int i = first + id;
    const bool here = i < n_v / 4;
    float four[4];
#pragma unroll
    for (int j = 0; j < 4; j++) four[j] = here ? v[4 * i + j] : 0.f;
    round_four(four, here, row * (n_v / 32) + i / 8, i % 8, xq, xd, xs);
  }
}

// tiles (n, 2): first token, count. groups (n, 3): KV head, first of its query heads in `heads`, count. grid: groups, tiles,
// splits. With several splits, `part` gets maximum, sum and the unfinished n_v sums of each row, and the last block of threads of a
// group and tile joins them; `counters` has a zero for each. With xq, rows are left in 8 bits too.
template <int R>
MPL_INLINE void attend(const float* q, const u8* keys, const u8* values, const int* positions, const int* sequences,
                       const int* tables, int n_table, const int* tiles, const int* groups, const int* heads, int n_head, int n_kv,
                       int n_k, int n_v, float scale, float softcap, int window, const float* sinks, float* part, float* out,
                       int* counters, int* xq, float* xd, float* xs) {
  const int lane = threadIdx.x % MPL_WARP, warp = threadIdx.x / MPL_WARP;
  const int first = tiles[2 * blockIdx.y], n_tokens = tiles[2 * blockIdx.y + 1];
  const int kv = groups[3 * blockIdx.x], n_rows = n_tokens * groups[3 * blockIdx.x + 2], per_token = groups[3 * blockIdx.x + 2];
  heads += groups[3 * blockIdx.x + 1];
  const int* table = tables + (i64)sequences[first] * n_table;
  MPL_DYN_SHARED(float, qs);                             // R x n_k
  float *ps = qs + R * n_k, *ms = ps + kWarps * R * MPL_WARP;  // scores; then maxima and sums of the warps
  float *ls = ms + kWarps * R, *mixed = ls + kWarps * R;       // kWarps x n_v

  for (int i = threadIdx.x; i < R * n_k; i += blockDim.x) {
    const int r = i / n_k;
    qs[i] = r < n_rows ? q[((i64)(first + r / per_token) * n_head + heads[r % per_token]) * n_k + i % n_k] * scale : 0.f;
  }
  int seen[R];
#pragma unroll
  for (int r = 0; r < R; r++) seen[r] = r < n_rows ? positions[first + r / per_token] : -1;
  __syncthreads();

  const int last = positions[first + n_tokens - 1], oldest = window ? max(0, positions[first] - window + 1) : 0;
  const int chunk0 = oldest / MPL_WARP, n_chunks = last / MPL_WARP + 1 - chunk0;
  const int share = (n_chunks + (int)gridDim.z - 1) / (int)gridDim.z;
  const int stop = chunk0 + min(n_chunks, (int)(blockIdx.z + 1) * share);
  float top[R], sum[R], acc[R][MPL_PAIRS][2];
#pragma unroll
  for (int r = 0; r < R; r++) {
    top[r] = kLeast, sum[r] = 0.f;
#pragma unroll
    for (int i = 0; i < MPL_PAIRS; i++) acc[r][i][0] = acc[r][i][1] = 0.f;
  }
  float* p = ps + warp * R * MPL_WARP;

  for (int chunk = chunk0 + (int)blockIdx.z * share + warp; chunk < stop; chunk += kWarps) {
    const int position = chunk * MPL_WARP + lane;
    const bool here = position >= oldest && position <= last;
    Floats<R> weights;
    float* score = weights.v;
#pragma unroll
    for (int r = 0; r < R; r++) score[r] = 0.f;
    if (here) {
      const u8* row = keys + row_of(table, position, n_kv, kv) * K::bytes(n_k);
      if (n_k % 8 == 0) {
#pragma unroll kAtOnce<R>
        for (int d = 0; d < n_k; d += 8) {
          float k[8];
          K::eight(row, d, k);
#pragma unroll
          for (int r = 0; r < R; r++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
              const Floats<4> four = *(const Floats<4>*)(qs + r * n_k + d + 4 * half);
#pragma unroll
              for (int j = 0; j < 4; j++) score[r] += four.v[j] * k[4 * half + j];
            }
        }
      } else {
        for (int d = 0; d < n_k; d++) {
          const float k = K::at(row, d);
#pragma unroll
          for (int r = 0; r < R; r++) score[r] += qs[r * n_k + d] * k;
        }
      }
    }
#pragma unroll
    for (int r = 0; r < R; r++) {
      const bool visible = here && position <= seen[r] && (window == 0 || seen[r] - position < window);
      if (softcap != 0.f) score[r] = softcap * tanhf(score[r] / softcap);
      const float best = fmaxf(top[r], lanes_max<MPL_WARP>(visible ? score[r] : kLeast));
      const float shrink = expf(top[r] - best), weight = visible ? expf(score[r] - best) : 0.f;
      top[r] = best;
      sum[r] = sum[r] * shrink + weight;
      score[r] = weight;
#pragma unroll
      for (int i = 0; i < MPL_PAIRS; i++) acc[r][i][0] *= shrink, acc[r][i][1] *= shrink;
    }
    *(Floats<R>*)(p + lane * R) = weights;
    __syncwarp();
#pragma unroll
    for (int block = 0; block < MPL_WARP / 32; block++) {
      // What lies outside of the range may be anything, not only numbers.
      const int start = chunk * MPL_WARP + 32 * block, from = max(0, oldest - start), to = min(31, last - start);
      if (from > to) continue;
      const u8* rows = values + row_of(table, start, n_kv, kv) * V::bytes(n_v);
      if (n_v % 2 == 0) add_values<R, true>(acc, p + 32 * block * R, rows, from, to, n_v, lane);
      else add_values<R, false>(acc, p + 32 * block * R, rows, from, to, n_v, lane);
    }
    __syncwarp();
  }

#pragma unroll
  for (int r = 0; r < R; r++) {
    const float all = lanes_sum<MPL_WARP>(sum[r]);
    if (lane == 0) ms[warp * R + r] = top[r], ls[warp * R + r] = all;
  }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < R; r++) {
    if (r >= n_rows) break;
    float best = kLeast, total = 0.f;
    for (int i = 0; i < kWarps; i++) best = fmaxf(best, ms[i * R + r]);
    const int head = heads[r % per_token];
    const bool last_word = gridDim.z == 1;
    if (last_word && sinks) best = fmaxf(best, sinks[head]);
    for (int i = 0; i < kWarps; i++) total += ls[i * R + r] * expf(ms[i * R + r] - best);
    if (last_word && sinks) total += expf(sinks[head] - best);
    const float factor = expf(top[r] - best);
#pragma unroll
    for (int i = 0; i < MPL_PAIRS; i++) {
      const int d = 2 * (i * MPL_WARP + lane);
      if (d < n_v) mixed[warp * n_v + d] = acc[r][i][0] * factor;
      if (d + 1 < n_v) mixed[warp * n_v + d + 1] = acc[r][i][1] * factor;
    }
    __syncthreads();
    float* to = last_word ? out + ((i64)(first + r / per_token) * n_head + head) * n_v
                          : part + ((((i64)blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z + blockIdx.z) * R + r) * (n_v + 2) + 2;
    for (int d = threadIdx.x; d < n_v; d += blockDim.x) {
      float v = 0.f;
      for (int i = 0; i < kWarps; i++) v += mixed[i * n_v + d];
      if (last_word) v /= total;
      to[d] = mixed[d] = v;
    }
    if (!last_word && threadIdx.x == 0) to[-2] = best, to[-1] = total;
    __syncthreads();
    if (last_word && xq) {
      round_row(mixed, (i64)(first + r / per_token) * n_head + head, n_v, threadIdx.x, blockDim.x, xq, xd, xs);
      __syncthreads();
    }
  }
  if (gridDim.z == 1 || !is_last_block(counters + blockIdx.y * gridDim.x + blockIdx.x, gridDim.z)) return;
  part += ((i64)blockIdx.y * gridDim.x + blockIdx.x) * gridDim.z * R * (n_v + 2);
  mixed += warp * n_v;
  for (int r = warp; r < n_rows; r += kWarps) {
    const int head = heads[r % per_token];
    const i64 row = (i64)(first + r / per_token) * n_head + head;
    join<true>(part + r * (n_v + 2), R * (n_v + 2), gridDim.z, n_v, lane, sinks ? sinks + head : nullptr, out + row * n_v, mixed);
    if (!xq) continue;
    __syncwarp();
    round_row(mixed, row, n_v, lane, MPL_WARP, xq, xd, xs);
    __syncwarp();
  }
}

// The 1 lets NVIDIA's compiler take the registers that it needs, in place of fewer and spills.
#define ATTEND(R)                                                                                                             \
  extern "C" __global__ void __launch_bounds__(kWarps* MPL_WARP, 1)                                                            \
      attend_##R(const float* q, const u8* keys, const u8* values, const int* positions, const int* sequences,                \
                 const int* tables, int n_table, const int* tiles, const int* groups, const int* heads, int n_head, int n_kv, \
                 int n_k, int n_v, float scale, float softcap, int window, const float* sinks, float* part, float* out,       \
                 int* counters, int* xq, float* xd, float* xs) {                                                             \
    attend<R>(q, keys, values, positions, sequences, tables, n_table, tiles, groups, heads, n_head, n_kv, n_k, n_v, scale,    \
              softcap, window, sinks, part, out, counters, xq, xd, xs);                                                       \
  }                                                                                                                           \
  MPL_EXPORT(attend_##R)
ATTEND(1)
ATTEND(2)
ATTEND(4)
// With more elements of values, eight rows do not fit into registers.
#if MPL_PAIRS <= 2
ATTEND(8)
#endif

// For what attention_mma.cu has left: joins the splits of each row; grid: groups, tiles, rows; a warp to a block.
extern "C" __global__ void combine(const float* part, int n_split, int n_rows_max, const int* tiles, const int* groups,
                                   const int* heads, int n_head, int n_v, const float* sinks, float* out) {
  const int r = blockIdx.z, per_token = groups[3 * blockIdx.x + 2];
  if (r >= tiles[2 * blockIdx.y + 1] * per_token) return;
  const int head = heads[groups[3 * blockIdx.x + 1] + r % per_token], step = n_rows_max * (n_v + 2);
  part += ((i64)blockIdx.y * gridDim.x + blockIdx.x) * n_split * step + (i64)r * (n_v + 2);
  float* to = out + ((i64)(tiles[2 * blockIdx.y] + r / per_token) * n_head + head) * n_v;
  join<false>(part, step, n_split, n_v, threadIdx.x, sinks ? sinks + head : nullptr, to, nullptr);
}
MPL_EXPORT(combine)
