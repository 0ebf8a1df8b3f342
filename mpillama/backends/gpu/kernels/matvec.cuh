// Products of up to 8 tokens, at the speed of the memory that the weights come from.
//
// A block of threads has a group of 8 rows (or 4), whose columns its warps share: warp i takes chunks i, i + n_warps, ... A
// lane keeps the activations of its columns in registers for all rows of the group. The bytes of a chunk of a row go to shared
// memory in pieces of 16, which neighbouring lanes read from neighbouring places, several rows ahead of what is decoded: with
// blocks of odd sizes (34 bytes, 210) each lane would read from a cache line of its own, over and over. Rows may begin
// anywhere: whole pieces are read around them, so the memory of the weights must begin and end at multiples of 16.
//
// A clock of a multiprocessor of an H200 brings 18 bytes. For 32 sub-blocks of Q4_K, 576 bytes, that leaves 128 instructions
// and 32 turns of the units that load and store. They take 80 and, by count, 24: of a chunk of a row 9 turns to bring the
// pieces and 12 to decode them, and an eighth of 19 for activations.
#pragma once
#include "activation.cuh"
#include "decode.cuh"
#include "round.cuh"

constexpr int kMostThreads = 256;
// Rows of a group. With 8 tokens 8 of them would need more registers than some GPUs have.
template <int NT> constexpr int group_of = MPL_FLOAT || NT == 8 ? 4 : 8;

// Adds v[0 .. N) up over the lanes of a warp. Afterwards lane i has sums i N / W + j in v[j], or, where there are more
// lanes than sums, each W / N neighbours have the same one. A step halves what is left to add, not each sum by itself.
template <int N, int M = MPL_WARP / 2> MPL_INLINE void fold(float* v) {
  const bool upper = threadIdx.x % MPL_WARP & M;
  if constexpr (N == 1) {
    v[0] += MPL_SHFL_XOR(v[0], M);
  } else {
#pragma unroll
    for (int i = 0; i < N / 2; i++) {
      const float keep = upper ? v[i + N / 2] : v[i], give = upper ? v[i] : v[i + N / 2];
      v[i] = keep + MPL_SHFL_XOR(give, M);
    }
  }
  if constexpr (M > 1) fold<N == 1 ? 1 : N / 2, M / 2>(v);
}

// The rows of a block, in halves: of gate and of up, or one after the other. Behind the last row it comes again.
template <int GROUP> struct Rows {
  const u8* base[2];
  int last[2], row_bytes;
  __device__ __forceinline__ int offset(int r) const { return min(r % (GROUP / 2), last[r / (GROUP / 2)]) * row_bytes; }
  __device__ __forceinline__ const u8* operator[](int r) const { return base[r / (GROUP / 2)] + offset(r); }
};

#if MPL_FLOAT
#define X_ARGS const float* x
#define X_CALL x
// Weights of 16 bytes; shared memory of a warp.
constexpr int kWide = 16 / kBytes, kRing = group_of<8> * 8 * 4;

template <int NT>
MPL_INLINE void add_products(float* sum, u8*, int, const Rows<group_of<NT>>& rows, const float* x, int share, int first, int n,
                             int n_in) {
  constexpr int kGroup = group_of<NT>;
  const int n_threads = blockDim.x;
  const float* own[NT];
#pragma unroll
  for (int t = 0; t < NT; t++) own[t] = x + (i64)((first + min(t, n - 1)) / share) * n_in;
  if ((((size_t)rows.base[0] | (size_t)rows.base[1] | (size_t)x | rows.row_bytes) & 15) == 0) {
    for (int i = threadIdx.x * kWide; i < n_in; i += n_threads * kWide) {
      Piece q[kGroup];
#pragma unroll
      for (int r = 0; r < kGroup; r++) q[r] = *(const Piece*)(rows[r] + (i64)i * kBytes);
#pragma unroll
      for (int t = 0; t < NT; t++)
#pragma unroll
        for (int part = 0; part < kWide / 4; part++) {
          const Piece a = *(const Piece*)(own[t] + i + 4 * part);
          const float v[4] = {as_float(a.x), as_float(a.y), as_float(a.z), as_float(a.w)};
#pragma unroll
          for (int r = 0; r < kGroup; r++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[r * NT + t] += weight_of(q[r], 4 * part + j) * v[j];
        }
    }
  } else {
    for (int i = threadIdx.x; i < n_in; i += n_threads)
#pragma unroll
      for (int r = 0; r < kGroup; r++) {
        const float v = weight_at(rows[r], i);
#pragma unroll
        for (int t = 0; t < NT; t++) sum[r * NT + t] += v * own[t][i];
      }
  }
}

#else
#define X_ARGS const int *xq, const float *xd, const float *xs
#define X_CALL xq, xd, xs

// What 32 activations are, in 8 bits. Those of few tokens are found with 32 bits.
struct Operand {
  u32 q[8];
  float d, sums[2];
};
template <class T> MPL_INLINE T at_byte(const void* p, u32 at) { return *(const T*)((const u8*)p + at); }
MPL_INLINE void load(Operand& a, const int* xq, const float* xd, const float* xs, u32 at) {
  const Piece low = at_byte<Piece>(xq, 32 * at), high = at_byte<Piece>(xq, 32 * at + 16);
  a.q[0] = low.x, a.q[1] = low.y, a.q[2] = low.z, a.q[3] = low.w;
  a.q[4] = high.x, a.q[5] = high.y, a.q[6] = high.z, a.q[7] = high.w;
  a.d = at_byte<float>(xd, 4 * at);
  if (kMin) a.sums[0] = at_byte<float>(xs, 8 * at), a.sums[1] = at_byte<float>(xs, 8 * at + 4);
  // Halves that have one minimum need one sum.
  if (kMin && !kHalves) a.sums[0] += a.sums[1];
}

MPL_INLINE float add_dot(float sum, const Sub& s, const Operand& a) {
  int low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    low = dot4(s.q[i], (int)a.q[i], low);
    (kHalves ? high : low) = dot4(s.q[i + 4], (int)a.q[i + 4], kHalves ? high : low);
  }
  float v = s.scale[0] * (float)low;
  if (kHalves) v += s.scale[1] * (float)high;
  sum += v * a.d;
  if (kMin) sum -= s.min[0] * a.sums[0];
  if (kMin && kHalves) sum -= s.min[1] * a.sums[1];
  return sum;
}

// What a warp reads of a row at a time: a sub-block for each lane. A stage has room for the pieces around it, and for the word
// behind them. Without asynchronous copies those of two rows are in registers while another is decoded.
constexpr int kChunkBytes = MPL_WARP * 32 / kBlock * kBytes, kPieces = (kChunkBytes + 14) / 16 + 1;
constexpr int kStage = kPieces * 16 + 16, kStages = !MPL_ASYNC ? 2 : kStage > 640 ? 4 : 8;
constexpr int kRing = kStages * kStage, kTurns = (kPieces + MPL_WARP - 1) / MPL_WARP;

// What a lane brings of a chunk of a row to the `ring` of its warp, stage `slot`: every MPL_WARP-th piece, the first being that
// of byte `from`, as long as the chunk goes on, of which `left` bytes are left at `from`.
#if MPL_ASYNC
template <int SLOTS> struct Pipe {
  static constexpr int ahead = SLOTS - 1;
  SharedAt to;
  __device__ __forceinline__ Pipe(u8* own, const u8*) : to(shared_at(own)) { MPL_KEEP(to); }
  __device__ __forceinline__ void start(int slot, const u8* from, int left) {
    const int before = (int)((size_t)from & 15);
    const u8* piece = (const u8*)((size_t)from & ~(size_t)15);
#pragma unroll
    for (int at = 0; at < kTurns * MPL_WARP * 16; at += MPL_WARP * 16)
      if (at < before + left) copy_16(to + (slot * kStage + at), piece + at);
    commit_copies();
  }
  // The oldest is there, once the lanes have met.
  __device__ __forceinline__ void arrive(int) { wait_for_copies<ahead - 1>(); }
};
#else
template <int SLOTS> struct Pipe {
  static constexpr int ahead = 2;
  // A row each, on their way: what comes next, and what is behind it.
  Piece first[kTurns], second[kTurns];
  int n_first, n_second;
  // Lanes with nothing to bring read this: where only some lanes read, the others' registers would have to be kept, and for that
  // all have to wait until what is on its way has come.
  const Piece* any;
  u8* own;
  __device__ __forceinline__ Pipe(u8* shared, const u8* weights) : n_first(0), n_second(0), any(piece_at(weights)), own(shared) {}
  // By the difference: of a pointer that was a number AMD's compiler does not know what memory it is to, and waits for all.
  static __device__ __forceinline__ const Piece* piece_at(const u8* p) { return (const Piece*)(p - (int)((size_t)p & 15)); }
  __device__ __forceinline__ void start(int, const u8* from, int left) {
    const Piece* piece = piece_at(from);
    n_first = n_second, n_second = (int)((size_t)from & 15) + left;
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++) {
      first[turn] = second[turn];
      second[turn] = *(turn * MPL_WARP * 16 < n_second ? piece + turn * MPL_WARP : any);
    }
  }
  __device__ __forceinline__ void arrive(int slot) {
#pragma unroll
    for (int turn = 0; turn < kTurns; turn++)
      if (turn * MPL_WARP * 16 < n_first) ((Piece*)(own + slot * kStage))[turn * MPL_WARP] = first[turn];
  }
};
#endif

template <int NT>
MPL_INLINE void add_products(float* sum, u8* ring, int lane, const Rows<group_of<NT>>& rows, const int* xq, const float* xd,
                             const float* xs, int share, int first, int n, int n_in) {
  constexpr int kGroup = group_of<NT>, slots = !MPL_ASYNC ? 2 : kStages < kGroup ? kStages : kGroup;
  const int warp = threadIdx.x / MPL_WARP, n_warps = blockDim.x / MPL_WARP, n_sub = n_in / 32;
  // Of weights without columns there is no byte that could be read.
  if (n_sub == 0) return;
  u32 offset[kGroup];
#pragma unroll
  for (int r = 0; r < kGroup; r++) {
    offset[r] = rows.offset(r);
    MPL_KEEP(offset[r]);
  }
  Pipe<slots> pipe(ring + 16 * lane, rows.base[0]);
  constexpr int ahead = pipe.ahead;
  // Of this chunk and the next: the rows' bytes from this lane's piece on, and how many of the chunk are left there.
  const int step = n_warps * kChunkBytes, shift = warp * kChunkBytes + 16 * lane;
  const u8 *base[2] = {rows.base[0] + shift, rows.base[1] + shift}, *next_base[2];
  const auto bytes_left = [&](int sub) {
    const int left = rows.row_bytes - sub / MPL_WARP * kChunkBytes;
    return sub < n_sub + lane ? (left < kChunkBytes ? left : kChunkBytes) - 16 * lane : -16;
  };
  int sub = warp * MPL_WARP + lane, left = bytes_left(sub);
#pragma unroll
  for (int r = 0; r < ahead; r++) pipe.start(r, base[r / (kGroup / 2)] + offset[r], left);
  for (; sub < n_sub + lane; sub += n_warps * MPL_WARP, base[0] = next_base[0], base[1] = next_base[1]) {
    next_base[0] = base[0] + step, next_base[1] = base[1] + step;
    MPL_KEEP_POINTER(next_base[0]);
    MPL_KEEP_POINTER(next_base[1]);
    const int next_left = bytes_left(sub + n_warps * MPL_WARP);
    const bool here = sub < n_sub;
    Operand x[NT];
#pragma unroll
    for (int t = 0; t < NT; t++)
      if (here) load(x[t], xq, xd, xs, (u32)((first + min(t, n - 1)) / share * n_sub + sub));
#pragma unroll
    for (int r = 0; r < kGroup; r++) {
      pipe.arrive(r % slots);
      // All lanes see this row, and have done with the one before, whose place is free now.
      __syncwarp();
      const int to = (r + ahead) % kGroup, half = to / (kGroup / 2);
      const bool same = r + ahead < kGroup;
      pipe.start(to % slots, (same ? base : next_base)[half] + offset[to], same ? left : next_left);
      if (!here) continue;
      Sub s;
      decode(Staged{ring + r % slots * kStage, (int)((size_t)(base[r / (kGroup / 2)] + offset[r]) & 15)}, lane, s);
#pragma unroll
      for (int t = 0; t < NT; t++) sum[r * NT + t] = add_dot(sum[r * NT + t], s, x[t]);
    }
    left = next_left;
  }
}
#endif

// NT tokens at once. With activation < 0 up to three matrices w0, w1, w2 of n0, n1, n2 rows, one after the other, give y0, y1,
// y2; else w0 is the gate and w1 goes up, n0 rows each, and y0 is act(gate) * up; with yq, in 8 bits too: the last block of threads
// of 32 rows sees to it, and `counters` has a zero for each 32. With `experts`, blockIdx.y is a pair, whose activations are row
// pair / share of x, and whose answer is zero where the expert is negative.
template <int NT>
MPL_INLINE void matvec(const u8* w0, const u8* w1, const u8* w2, i64 row_bytes, i64 mat_bytes, const int* experts, int share,
                       X_ARGS, float* y0, float* y1, float* y2, int n0, int n1, int n2, int activation, int n_in,
                       int n_tokens, int* counters, int* yq, float* yd, float* ys) {
  constexpr int kGroup = group_of<NT>, N = kGroup * NT;
  MPL_DYN_SHARED(u8, shared);
  int warp = threadIdx.x / MPL_WARP, lane = threadIdx.x % MPL_WARP, ring_at = warp * kRing;
  MPL_KEEP(lane);
  MPL_KEEP(ring_at);
  const int n_warps = blockDim.x / MPL_WARP;
  u8* ring = shared + ring_at;
  const bool gated = activation >= 0;
  const int first = blockIdx.y * NT, n = min(NT, n_tokens - first);
  const int expert = experts ? experts[first] : 0;
  int group = blockIdx.x, n_rows = n0;
  float* y = y0;
  const u8* w = w0;
  if (!gated) {
    const int groups0 = (n0 + kGroup - 1) / kGroup, groups1 = (n1 + kGroup - 1) / kGroup;
    if (group >= groups0 + groups1) group -= groups0 + groups1, w = w2, y = y2, n_rows = n2;
    else if (group >= groups0) group -= groups0, w = w1, y = y1, n_rows = n1;
  }
  const int row0 = group * (gated ? kGroup / 2 : kGroup), row1 = gated ? row0 : min(row0 + kGroup / 2, n_rows - 1);
  float sum[N];
#pragma unroll
  for (int i = 0; i < N; i++) sum[i] = 0.f;
  if (expert >= 0) {
    w += expert * mat_bytes;
    const Rows<kGroup> rows{{w + row0 * row_bytes, (gated ? w1 : w) + row1 * row_bytes},
                    {min(n_rows - 1 - row0, kGroup), min(n_rows - 1 - row1, kGroup)},
                    (int)row_bytes};
    add_products<NT>(sum, ring, lane, rows, X_CALL, share, first, n, n_in);
  }
  // Here the lanes of a warp meet, and none of them needs the ring any more.
  fold<N>(sum);
  constexpr int spread = N < MPL_WARP ? MPL_WARP / N : 1, each = N < MPL_WARP ? 1 : N / MPL_WARP;
  if (lane % spread == 0)
#pragma unroll
    for (int i = 0; i < each; i++) ((float*)ring)[lane / spread * each + i] = sum[i];
  __syncthreads();
  for (int i = threadIdx.x; i < N; i += blockDim.x) {
    const int r = i / NT, t = i % NT, row = row0 + r;
    if (t >= n || row >= n_rows || (gated && r >= kGroup / 2)) continue;
    float v = 0.f, up = 0.f;
#pragma unroll 1
    for (int k = 0; k < n_warps; k++) {
      const float* sums = (const float*)(shared + k * kRing) + i;
      v += sums[0];
      if (gated) up += sums[N / 2];
    }
    if (gated) v = gate_with(activation, v, up);
    y[(i64)(first + t) * n_rows + row] = v;
  }
  if (!yq || !is_last_block(counters + row0 / 32, 32 / (kGroup / 2))) return;
  for (int base = 0; base < 8 * NT; base += blockDim.x) {
    const int t = (base + (int)threadIdx.x) / 8, part = threadIdx.x % 8;
    const bool here = t < n;
    const float* from = y + (i64)t * n_rows + row0 / 32 * 32 + 4 * part;
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = here ? fresh(from + j) : 0.f;
    round_four(v, here, (i64)t * (n_rows / 32) + row0 / 32, part, yq, yd, ys);
  }
}

#define MATVEC(NT)                                                                                                            \
  extern "C" __global__ void __launch_bounds__(kMostThreads, 1)                                                                \
      matvec_##NT(const u8* w0, const u8* w1, const u8* w2, i64 row_bytes, i64 mat_bytes, const int* experts, int share,      \
                  X_ARGS, float* y0, float* y1, float* y2, int n0, int n1, int n2, int activation, int n_in, int n_tokens,    \
                  int* counters, int* yq, float* yd, float* ys) {                                                             \
    matvec<NT>(w0, w1, w2, row_bytes, mat_bytes, experts, share, X_CALL, y0, y1, y2, n0, n1, n2, activation, n_in, n_tokens,  \
               counters, yq, yd, ys);                                                                                         \
  }                                                                                                                           \
  MPL_EXPORT(matvec_##NT)
MATVEC(1)
MATVEC(2)
MATVEC(4)
MATVEC(8)
