// Attention of sequences with several tokens in a step, on matrix units: FlashAttention-2 (arXiv:2307.08691) over the paged cache.
//
// Keys are of type MPL_K_TYPE with MPL_N_K elements, values of MPL_V_TYPE with MPL_N_V, both multiples of 16. A thread block has up
// to 16 query rows for each of its warps (tokens of one sequence times query heads of one KV head), and goes through the keys in
// tiles of MPL_KEYS. A tile lies in shared memory as float16, once for all warps: its values arrive while the keys are multiplied,
// and the next keys while the values are. Scores and weights of a warp's rows stay in its registers.
#include "codec.cuh"
#include "half_math.cuh"

#if MPL_MMA && MPL_WARP == 32
constexpr int kK = MPL_N_K, kV = MPL_N_V, kKeys = MPL_KEYS;
// Bytes from row to row. An odd number of 16 bytes, so that the same column of eight rows is in all the 32 banks.
constexpr int kPitchK = 2 * kK + 16, kPitchV = 2 * kV + 16;
// Less than any score, and yet its differences are numbers.
constexpr float kLeast = -1e30f;
// The largest weight of a row is 2^15, so that small ones are not lost in float16, which ends at 65504 and 2^-24.
constexpr float kLargest = 15.f, kLog2e = 1.44269504f, kLn2 = 0.69314718f;
static_assert(kK % 16 == 0 && kV % 16 == 0 && kKeys % 32 == 0, "matrices of 16 x 16, blocks of 32 tokens");

struct __align__(8) Two { float x, y; };

MPL_INLINE float exp2_of(float x) {
#if defined(MPL_EMULATE)
  return exp2f(x);
#else
  float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
#endif
}
MPL_INLINE float one_over(float x) {
#if defined(MPL_EMULATE)
  return 1.f / x;
#else
  float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y;
#endif
}
// threadIdx.x, in a way that the compiler does not see to be the same: what is worked out of it once more takes no registers
// from the loop in between.
MPL_INLINE int thread_again() {
#if defined(MPL_EMULATE)
  return threadIdx.x;
#else
  int id; asm volatile("mov.u32 %0, %tid.x;" : "=r"(id)); return id;
#endif
}

// -- eight numbers of a row as float16, from its part i. What float16 has no room for becomes its largest number.

// Four bytes as two words.
MPL_INLINE void four(u32 bytes, u32 offset, u16 factor, u32* out) {
  out[0] = times(bytes_less<0>(bytes, offset), factor);
  out[1] = times(bytes_less<1>(bytes, offset), factor);
}

template <int TYPE, int N> struct Part;
template <int N> struct Part<T_F16, N> { static constexpr int kBytes = 2 * N; };
template <int N> struct Part<T_BF16, N> {
  static constexpr int kBytes = 2 * N;
  MPL_INLINE Piece get(const u8* row, int i) {
    const Piece from = *(const Piece*)(row + 16 * i);
    u32 to[4];
#pragma unroll
    for (int j = 0; j < 4; j++) to[j] = halves(clamped(as_float(word_of(from, j) << 16)), clamped(as_float(word_of(from, j) & 0xFFFF0000u)));
    return piece_of(to[0], to[1], to[2], to[3]);
  }
};
template <int N> struct Part<T_Q8_0, N> {
  static constexpr int kBytes = N / 32 * 34;
  MPL_INLINE Piece get(const u8* row, int i) {
    const u8* b = row + i / 4 * 34;
    const u16 d = *(const u16*)b;
    u32 to[4];
    four(word<2>(b + 2 + i % 4 * 8) ^ 0x80808080u, kSigned, d, to);
    four(word<2>(b + 6 + i % 4 * 8) ^ 0x80808080u, kSigned, d, to + 2);
    return piece_of(to[0], to[1], to[2], to[3]);
  }
};
template <int N> struct Part<T_Q4_0, N> {
  static constexpr int kBytes = N / 32 * 18;
  MPL_INLINE Piece get(const u8* row, int i) {
    const u8* b = row + i / 4 * 18;
    const u16 d = *(const u16*)b;
    const int shift = i % 4 / 2 * 4;
    u32 to[4];
    // Less 1032.
    four(word<2>(b + 2 + i % 2 * 8) >> shift & 0x0F0F0F0Fu, 0x64086408u, d, to);
    four(word<2>(b + 6 + i % 2 * 8) >> shift & 0x0F0F0F0Fu, 0x64086408u, d, to + 2);
    return piece_of(to[0], to[1], to[2], to[3]);
  }
};

// The KV blocks of a tile, of those that have something to be seen.
struct Blocks {
  int number[kKeys / 32];
  MPL_INLINE Blocks of(const int* table, int start, int oldest, int last) {
    Blocks found;
#pragma unroll
    for (int b = 0; b < kKeys / 32; b++) found.number[b] = table[min(max(start + 32 * b, oldest), last) / 32];
    return found;
  }
};

// Brings the rows of a tile, and zeros for those outside of the range: what lies there may be anything, not only numbers.
template <int TYPE, int N, int PITCH, int THREADS>
MPL_INLINE void bring(SharedAt to, const u8* cache, const Blocks& blocks, int start, int oldest, int last, int n_kv, int kv) {
  constexpr int kParts = N / 8, kBytes = Part<TYPE, N>::kBytes, kCount = 32 * kParts;
  // What is under way has registers; long heads have none to spare.
  constexpr int kAtOnce = N <= 192 ? 4 : 1;
#pragma unroll
  for (int b = 0; b < kKeys / 32; b++) {
    const u8* from = cache + ((i64)blocks.number[b] * n_kv + kv) * (32 * kBytes);
    const int low = oldest - start - 32 * b, high = last - start - 32 * b;
#pragma unroll kAtOnce
    for (int j = 0; j < kCount; j += THREADS) {
      const int i = threadIdx.x + j;
      if (kCount % THREADS != 0 && i >= kCount) break;
      const int row = i / kParts, part = i % kParts;
      const bool there = row >= low && row <= high;
      const SharedAt at = to + (32 * b + row) * PITCH + 16 * part;
      if constexpr (TYPE == T_F16) {
        copy_16(at, from + 16 * i, !there);
      } else {
        Piece v = piece_of(0, 0, 0, 0);
        if (there) v = Part<TYPE, N>::get(from + row * kBytes, part);
        store_16(at, v);
      }
    }
  }
}

// tiles, groups, heads, part and out are those of attention.cu; grid: groups, tiles, splits. Tiles are taken from the last one on,
// which see most. `part` has 16 rows for each warp.
template <int WARPS>
MPL_INLINE void attend_tiles(const float* q, const u8* keys, const u8* values, const int* positions, const int* sequences,
                             const int* tables, int n_table, const int* tiles, const int* groups, const int* heads, int n_head,
                             int n_kv, float scale, float softcap, int window, const float* sinks, float* part, float* out) {
  constexpr int kThreads = 32 * WARPS;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int tile = (int)gridDim.y - 1 - (int)blockIdx.y;
  const int first = tiles[2 * tile], n_tokens = tiles[2 * tile + 1];
  const int kv = groups[3 * blockIdx.x], per_token = groups[3 * blockIdx.x + 2], n_rows = n_tokens * per_token;
  heads += groups[3 * blockIdx.x + 1];
  const int* table = tables + (i64)sequences[first] * n_table;
  MPL_DYN_SHARED(u8, memory);
  const SharedAt k_tile = shared_at(memory), v_tile = k_tile + kKeys * kPitchK;

  // What this lane reads of a matrix of 16 x 16: of keys two times eight rows, of values the same transposed.
  const SharedAt k_lane = k_tile + (lane / 16 * 8 + lane % 8) * kPitchK + lane / 8 % 2 * 16;
  const SharedAt v_lane = v_tile + (lane / 8 % 2 * 8 + lane % 8) * kPitchV + lane / 16 * 16;

  // A lane has two rows, g and g + 8 of its warp's. q is rounded to float16 after a power of two has made the largest number of
  // its row one between 2^14 and 2^15; `unit` makes a product a score, in powers of 2.
  float unit[2];
  u32 a[kK / 16][4];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = 16 * warp + g + 8 * h, token = first + (r < n_rows ? r / per_token : 0);
    const Two* row = (const Two*)(q + ((i64)token * n_head + heads[r % per_token]) * kK) + t;
    float top = 0.f;
#pragma unroll
    for (int i = 0; i < kK / 8; i++) top = fmaxf(top, fmaxf(fabsf(row[4 * i].x), fabsf(row[4 * i].y)));
    const int exponent = max((int)(as_bits(lanes_max<4>(top)) >> 23), 15);
    const float up = as_float((u32)(268 - exponent) << 23 | (as_bits(scale) & 0x80000000u));
    // Not 0: scores that are hidden are -inf.
    unit[h] = fmaxf(fabsf(scale) * kLog2e * as_float((u32)(exponent - 14) << 23), 1e-37f);
#pragma unroll
    for (int i = 0; i < kK / 8; i++) {
      const Two x = row[4 * i];
      a[i / 2][h + i % 2 * 2] = r < n_rows ? halves(x.x * up, x.y * up) : 0;
    }
  }
  float top[2] = {kLeast, kLeast}, sum[2] = {}, acc[kV / 8][4];
#pragma unroll
  for (int i = 0; i < kV / 8; i++) acc[i][0] = acc[i][1] = acc[i][2] = acc[i][3] = 0.f;

  // What the first and the last row of the warp see, if it has any.
  const bool any = 16 * warp < n_rows;
  const int low = any ? positions[first + 16 * warp / per_token] : -1;
  const int high = any ? positions[first + min(16 * warp + 15, n_rows - 1) / per_token] : -1;
  const int last = positions[first + n_tokens - 1], oldest = window ? max(0, positions[first] - window + 1) : 0;
  const int tile0 = oldest / kKeys, n_tiles = last / kKeys + 1 - tile0, share = (n_tiles + (int)gridDim.z - 1) / (int)gridDim.z;
  const int begin = (tile0 + min(n_tiles, (int)blockIdx.z * share)) * kKeys;
  const int stop = (tile0 + min(n_tiles, (int)(blockIdx.z + 1) * share)) * kKeys;

  Blocks blocks = Blocks::of(table, begin, oldest, last);
  if (begin < stop) bring<MPL_K_TYPE, kK, kPitchK, kThreads>(k_tile, keys, blocks, begin, oldest, last, n_kv, kv);
  for (int start = begin; start < stop; start += kKeys) {
    const bool active = start <= high && (window == 0 || low - (start + kKeys - 1) < window);
    u32 p[kKeys / 16][4];
    wait_for_copies();
    __syncthreads();
    bring<MPL_V_TYPE, kV, kPitchV, kThreads>(v_tile, values, blocks, start, oldest, last, n_kv, kv);
    blocks = Blocks::of(table, start + kKeys, oldest, last);
    if (active) {
      float s[kKeys / 8][4];
#pragma unroll
      for (int i = 0; i < kK / 16; i++)
#pragma unroll
        for (int n = 0; n < kKeys / 8; n += 2) {
          u32 b[4];
          load_matrices<false>(b, k_lane + 8 * n * kPitchK + 32 * i);
          mma_half(s[n], a[i], b[0], b[1], i == 0);
          mma_half(s[n + 1], a[i], b[2], b[3], i == 0);
        }
      float to_log2[2] = {unit[0], unit[1]};
      if (softcap != 0.f) {
        // tanh(x) = 1 - 2 / (1 + e^2x), to about 1e-7.
        const float most = softcap * kLog2e, inner = 2.f / softcap;
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
          for (int j = 0; j < 4; j++) s[n][j] = most - 2.f * most * one_over(1.f + exp2_of(s[n][j] * to_log2[j / 2] * inner));
        to_log2[0] = to_log2[1] = 1.f;
      }
      if (start + kKeys - 1 > low || (window && high - start >= window)) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int id = thread_again(), r = id / 32 * 16 + id % 32 / 4 + 8 * h;
          const int seen = r < n_rows ? positions[first + r / per_token] : -1;
          const int to = seen - start - id % 4 * 2, from = window ? to - window + 1 : -kKeys;
#pragma unroll
          for (int n = 0; n < kKeys / 8; n++)
#pragma unroll
            for (int j = 0; j < 2; j++)
              if (8 * n + j > to || 8 * n + j < from) s[n][2 * h + j] = -MPL_INF;
        }
      }
      float shrink[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float best = top[h];
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) best = fmaxf(best, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        best = lanes_max<4>(best);
        shrink[h] = exp2_of((top[h] - best) * to_log2[h]);
        const float shift = kLargest - best * to_log2[h];
        top[h] = best;
        float more = 0.f;
#pragma unroll
        for (int n = 0; n < kKeys / 8; n++) {
          const float x = exp2_of(s[n][2 * h] * to_log2[h] + shift), y = exp2_of(s[n][2 * h + 1] * to_log2[h] + shift);
          more += x + y;
          p[n / 2][h + n % 2 * 2] = halves(x, y);
        }
        sum[h] = sum[h] * shrink[h] + more;
      }
      // Largest scores seldom change after a few tiles.
      if (any_lane(shrink[0] != 1.f || shrink[1] != 1.f)) {
#pragma unroll
        for (int i = 0; i < kV / 8; i++)
#pragma unroll
          for (int j = 0; j < 4; j++) acc[i][j] *= shrink[j / 2];
      }
    }
    wait_for_copies();
    __syncthreads();
    if (start + kKeys < stop) bring<MPL_K_TYPE, kK, kPitchK, kThreads>(k_tile, keys, blocks, start + kKeys, oldest, last, n_kv, kv);
    if (active) {
#pragma unroll
      for (int i = 0; i < kKeys / 16; i++)
#pragma unroll
        for (int n = 0; n < kV / 8; n += 2) {
          u32 b[4];
          load_matrices<true>(b, v_lane + 16 * i * kPitchV + 16 * n);
          mma_half(acc[n], p[i], b[0], b[1], false);
          mma_half(acc[n + 1], p[i], b[2], b[3], false);
        }
    }
  }

  const bool last_word = gridDim.z == 1;
  const i64 n_part = ((i64)tile * gridDim.x + blockIdx.x) * gridDim.z + blockIdx.z;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int id = thread_again(), r = id / 32 * 16 + id % 32 / 4 + 8 * h;
    float total = lanes_sum<4>(sum[h]);
    if (r < n_rows) {
      const int head = heads[r % per_token];
      // As a power of 2; all that is summed up is relative to it.
      const float best = top[h] * (softcap != 0.f ? 1.f : unit[h]) - kLargest;
      if (last_word && sinks) total += exp2_of(sinks[head] * kLog2e - best);
      float* to = last_word ? out + ((i64)(first + r / per_token) * n_head + head) * kV : part + (n_part * (16 * WARPS) + r) * (kV + 2) + 2;
      const float share = last_word ? one_over(total) : 1.f;
#pragma unroll
      for (int i = 0; i < kV / 8; i++) ((Two*)to)[4 * i + id % 4] = {acc[i][2 * h] * share, acc[i][2 * h + 1] * share};
      if (!last_word && id % 4 == 0) to[-2] = total > 0.f ? best * kLn2 : kLeast, to[-1] = total;
    }
  }
}

// Two blocks on a multiprocessor where that leaves registers enough: what is decoded takes more of them than what is copied.
constexpr int kBlocks = kK + kV <= 128 && MPL_K_TYPE == T_F16 && MPL_V_TYPE == T_F16 ? 2 : 1;

#define TILES(WARPS)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(32 * WARPS, WARPS == 8 ? kBlocks : 1)                                              \
      attend_tiles_##WARPS(const float* q, const u8* keys, const u8* values, const int* positions, const int* sequences,        \
                           const int* tables, int n_table, const int* tiles, const int* groups, const int* heads, int n_head,   \
                           int n_kv, float scale, float softcap, int window, const float* sinks, float* part, float* out) {     \
    attend_tiles<WARPS>(q, keys, values, positions, sequences, tables, n_table, tiles, groups, heads, n_head, n_kv, scale,      \
                        softcap, window, sinks, part, out);                                                                     \
  }                                                                                                                             \
  MPL_EXPORT(attend_tiles_##WARPS)
TILES(2)
TILES(8)
#endif
