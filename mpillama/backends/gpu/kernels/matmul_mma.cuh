// Products of 9 tokens and more on matrix units: weights and activations in float16, sums in float32.
//
// A block of threads has 128 rows, 32 for each of its 4 warps, and N tokens, and goes through the columns in steps of 128. The bytes
// of weights come to the ring of the warp that needs them, in pieces of 16 and a span of columns ahead (see matvec.cuh), those of
// activations to memory of all warps. Weights are decoded into the registers that `mma_half` takes them from: a lane has 4
// rows (of AMD's 64 lanes 2), and in each of them all of one sub-block of the step's four. For that the columns of a step change
// places, which no sum minds: in product j lane t of the four that share a row has columns 4 j to 4 j + 3 of sub-block t, of weights
// and of activations alike, whichever four columns `mma_half` takes them for. So each weight is decoded once for N tokens, and a lane
// reads activations for two products in a piece of 16 bytes.
#pragma once
#include "decode.cuh"
#include "half_math.cuh"

#if MPL_MMA && MPL_TYPE != T_F32
constexpr int kStep = 128, kMmaWarps = 4, kWarpRows = 32, kMmaThreads = MPL_WARP * kMmaWarps, kMmaRows = kWarpRows * kMmaWarps;
// Copies that go on by themselves need a second buffer.
constexpr int kBuffers = MPL_ASYNC ? 2 : 1;
#if MPL_FLOAT
constexpr int kSpan = kStep, kSpanBytes = kSpan * kBytes;
// Of quantized weights float16 has the products by this, that it may have digits enough for small ones.
constexpr float kGrown = 1.f;
#else
constexpr int kSpan = kBlock > kStep ? kBlock : kStep, kSpanBytes = kSpan / kBlock * kBytes;
constexpr float kGrown = 64.f;
// Codes without a sign are counted from the one in their middle, that a minimum may be small beside what is multiplied.
constexpr int kMiddle = !kMin ? 0
                        : MPL_TYPE == T_Q6_K ? 32
                        : MPL_TYPE == T_Q5_0 || MPL_TYPE == T_Q5_1 || MPL_TYPE == T_Q5_K ? 16
                        : MPL_TYPE == T_IQ1_S || MPL_TYPE == T_IQ1_M ? 9
                        : MPL_TYPE == T_Q4_0 || MPL_TYPE == T_Q4_1 || MPL_TYPE == T_Q4_K ? 8
                        : MPL_TYPE == T_Q3_K ? 4
                        : MPL_TYPE == T_Q1_0 ? 0
                        : 1;
#endif
// Bytes from row to row: an odd number of 16, so that eight rows are in all the banks.
constexpr int kSpanPieces = (kSpanBytes + 14) / 16 + 1, kPitch = 16 * (kSpanPieces | 1), kSteps = kSpan / kStep;
constexpr int kSpanRing = kWarpRows * kPitch;

// 32 weights as 16 words; `left` columns of the row begin here.
MPL_INLINE void halves_of(Staged row, int sub, int left, u32* out) {
#if MPL_FLOAT
  words<2, 16>(row + 64 * sub, out);
#pragma unroll
  for (int i = 0; i < 16; i++) {
    if (2 * i + 1 >= left) out[i] &= 2 * i < left ? 0xFFFFu : 0u;
#if MPL_TYPE == T_BF16
    out[i] = halves(as_float(out[i] << 16), as_float(out[i] & 0xFFFF0000u));
#endif
  }
#else
  Sub s;
  decode(row, sub, s);
  u32 scale[2], minus[2];
#pragma unroll
  for (int h = 0; h < (kHalves ? 2 : 1); h++) {
    scale[h] = halves(s.scale[h] * kGrown, s.scale[h] * kGrown);
    const float min = (s.min[h] - (float)kMiddle * s.scale[h]) * kGrown;
    minus[h] = kMin ? halves(-min, -min) : 0;
  }
#pragma unroll
  for (int i = 0; i < 8; i++) {
    const u32 bytes = kMin ? (u32)s.q[i] : (u32)s.q[i] ^ 0x80808080u, offset = kMin ? 0x64006400u + 0x10001u * kMiddle : kSigned;
    const int h = kHalves ? i / 4 : 0;
    out[2 * i] = fused(bytes_less<0>(bytes, offset), scale[h], minus[h]);
    out[2 * i + 1] = fused(bytes_less<1>(bytes, offset), scale[h], minus[h]);
  }
#endif
}

// Where a lane's numbers are (see `mma_half`): of weights in rows own_row() + kRowStride r and sub-block own_sub(); of kMmaTokens
// tokens' activations in token own_row(); and of the product of 16 rows with them in row_of_sum() and token_of_sum(), i from 0 to 3.
// In place(), of N tokens' activations for a step, are those for products 2 j and 2 j + 1 of a token and sub-block t, counted in
// pieces; in own_place() a lane's of a tile of kMmaTokens. What 8 neighbouring lanes read, and what 8 neighbouring threads write,
// 2 sub-blocks of a token, is in different banks.
#if MPL_WARP == 32
constexpr int kLaneRows = 4, kRowStride = 8, kMmaTokens = 8, kLaneTokens = 2;
MPL_INLINE int own_row(int lane) { return lane / 4; }
MPL_INLINE int own_sub(int lane) { return lane % 4; }
MPL_INLINE int row_of_sum(int lane, int i) { return lane / 4 + 8 * (i / 2); }
MPL_INLINE int token_of_sum(int lane, int i) { return 2 * (lane % 4) + i % 2; }
template <int N> MPL_INLINE int place_at(int j, int at) { return j * 4 * N + (at ^ ((j & 1) << 2 | (j & 2))); }
template <int N> MPL_INLINE int place(int j, int token, int t) { return place_at<N>(j, 4 * token + t); }
template <int N> MPL_INLINE int own_place(int j, int tile, int lane) { return place_at<N>(j, 32 * tile + lane); }
MPL_INLINE void add_product(float* sum, const u32 (*a)[16], int word, u32 b0, u32 b1) {
  const u32 part[4] = {a[0][word], a[1][word], a[0][word + 1], a[1][word + 1]};
  mma_half(sum, part, b0, b1, false);
}
#else
constexpr int kLaneRows = 2, kRowStride = 16, kMmaTokens = 16, kLaneTokens = 1;
MPL_INLINE int own_row(int lane) { return lane % 16; }
MPL_INLINE int own_sub(int lane) { return lane / 16; }
MPL_INLINE int row_of_sum(int lane, int i) { return lane / 16 * 4 + i; }
MPL_INLINE int token_of_sum(int lane, int i) { return lane % 16; }
template <int N> MPL_INLINE int place(int j, int token, int t) { return (j * 4 + t) * N + (token ^ (j | (t & 1) << 2)); }
template <int N> MPL_INLINE int own_place(int j, int tile, int lane) { return place<N>(j, 16 * tile + lane % 16, lane / 16); }
MPL_INLINE void add_product(float* sum, const u32 (*a)[16], int word, u32 b0, u32 b1) { mma_half(sum, &a[0][word], b0, b1); }
#endif

// x (T, 32 subs) float16 and scales (T): `halve` in elementwise.cu. tiles, order and share: as in matmul.cu. Several blocks
// may share the columns, grid z: then y (z, T, n_rows) are parts of sums.
template <int N>
MPL_INLINE void matmul_mma(const u8* w, i64 row_bytes, i64 mat_bytes, const int* tiles, const int* order, int share, const u16* x,
                           const float* scales, float* y, int n_rows, int n_in, int n_tokens) {
  const int n_sub = (n_in + 31) / 32;
  const Tile tile = tile_of(tiles, N, n_tokens);
  const int first = tile.first, n = tile.n, n_steps = tile.expert < 0 ? 0 : (n_sub + 3) / 4;
  if (n == 0) return;
  w += max(tile.expert, 0) * mat_bytes;
  const int lane = threadIdx.x % MPL_WARP, warp = threadIdx.x / MPL_WARP, g = own_row(lane), t = own_sub(lane);
  const int row0 = warp * kWarpRows + g;
  w += (i64)blockIdx.x * kMmaRows * row_bytes;
  y += (i64)blockIdx.z * n_tokens * n_rows + blockIdx.x * kMmaRows;
  const int n_own = n_rows - blockIdx.x * kMmaRows;
  const int spans = (n_steps + kSteps - 1) / kSteps, own = (spans + (int)gridDim.z - 1) / (int)gridDim.z * kSteps;
  const int begin = min((int)blockIdx.z * own, n_steps), stop = min(begin + own, n_steps);

  MPL_DYN_SHARED(u8, memory);
  const u8* ring = memory + warp * (kBuffers * kSpanRing);
  const u8* tokens = memory + kMmaWarps * kBuffers * kSpanRing;
  const SharedAt ring_at = shared_at(memory) + warp * (kBuffers * kSpanRing);
  const SharedAt tokens_at = shared_at(memory) + kMmaWarps * kBuffers * kSpanRing;

  // A thread brings part i of the activations of every eighth token (with 256 threads: every sixteenth).
  constexpr int kApart = kMmaThreads / 16, kTokenPieces = N / kApart;
  const int i = threadIdx.x % 16, token0 = threadIdx.x / 16;
  u32 source[kTokenPieces];
#pragma unroll
  for (int k = 0; k < kTokenPieces; k++) {
    const int token = first + min(token0 + kApart * k, n - 1);
    source[k] = (u32)((order ? order[token] : token) / share);
  }
  // `move` gets each piece's number, where it goes to, where it comes from, and whether it is zeros instead.
  const auto token_pieces = [&](int step, auto move) {
    const bool here = 4 * step + i / 4 < n_sub;
#pragma unroll
    for (int k = 0; k < kTokenPieces; k++) {
      const int token = token0 + kApart * k;
      const u16* from = here ? x + (i64)source[k] * (32 * n_sub) + kStep * step + 8 * i : x;
      move(k, tokens_at + (step % kBuffers * N * 2 * kStep + 16 * place<N>(i % 4, token, i / 4)), from, !here || token >= n);
    }
  };
  // A lane brings every fourth piece of the rows that it decodes, or of the last one again.
  int offset[kLaneRows];
#pragma unroll
  for (int r = 0; r < kLaneRows; r++) offset[r] = min(row0 + kRowStride * r, n_own - 1) * (int)row_bytes;
  constexpr int kRowPieces = (kSpanPieces + 3) / 4;
  const auto weight_pieces = [&](int span, auto move) {
    const i64 at = (i64)span * kSpanBytes;
    const int left = (int)(row_bytes - at < kSpanBytes ? row_bytes - at : kSpanBytes);
#pragma unroll
    for (int r = 0; r < kLaneRows; r++) {
      const u8* from = w + at + offset[r];
      const int before = (int)((size_t)from & 15);
      from += 16 * t - before;
      const SharedAt to = ring_at + (span % kBuffers * kSpanRing + (g + kRowStride * r) * kPitch + 16 * t);
#pragma unroll
      for (int piece = 0; piece < kRowPieces; piece++)
        if (64 * piece + 16 * t < before + left) move(r * kRowPieces + piece, to + 64 * piece, from + 64 * piece, false);
    }
  };
#if MPL_ASYNC
  const auto copy = [](int, SharedAt to, const void* from, bool zeros) { copy_16(to, from, zeros); };
  const auto bring_tokens = [&](int step) { token_pieces(step, copy); };
  const auto bring_weights = [&](int span) { weight_pieces(span, copy); };
  // All copies are there, and nobody reads what the next ones overwrite.
  const auto receive = [&](int) {
    wait_for_copies();
    __syncthreads();
  };
#else
  // On their way in registers, until nobody reads what was there before.
  Piece held_tokens[kTokenPieces], held_weights[kLaneRows * kRowPieces];
  const auto take_from = [](Piece* held) {
    return [=](int k, SharedAt, const void* from, bool zeros) { held[k] = zeros ? piece_of(0, 0, 0, 0) : *(const Piece*)from; };
  };
  const auto put_from = [](const Piece* held) { return [=](int k, SharedAt to, const void*, bool) { *(Piece*)to = held[k]; }; };
  const auto bring_tokens = [&](int step) { token_pieces(step, take_from(held_tokens)); };
  const auto bring_weights = [&](int span) { weight_pieces(span, take_from(held_weights)); };
  const auto receive = [&](int step) {
    __syncthreads();
    token_pieces(step, put_from(held_tokens));
    if (step % kSteps == 0) weight_pieces(step / kSteps, put_from(held_weights));
    __syncthreads();
  };
#endif

  constexpr int kTiles = N / kMmaTokens;
  float sum[2][kTiles][4];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int k = 0; k < kTiles; k++) sum[m][k][0] = sum[m][k][1] = sum[m][k][2] = sum[m][k][3] = 0.f;

  if (begin < stop) bring_tokens(begin), bring_weights(begin / kSteps);
  for (int step = begin; step < stop; step++) {
    receive(step);
    const int span = step / kSteps;
    if (step + 1 < stop) {
      bring_tokens(step + 1);
      if ((step + 1) % kSteps == 0) bring_weights(span + 1);
    }
    u32 a[kLaneRows][16];
    const int sub = 4 * step + t;
#pragma unroll
    for (int r = 0; r < kLaneRows; r++) {
      if (sub < n_sub) {
        const Staged row{ring + span % kBuffers * kSpanRing + (g + kRowStride * r) * kPitch,
                         (int)((size_t)w + offset[r] + span * kSpanBytes & 15)};
        halves_of(row, step % kSteps * 4 + t, n_in - 32 * sub, a[r]);
      } else {
#pragma unroll
        for (int k = 0; k < 16; k++) a[r][k] = 0;
      }
    }
    const Piece* from = (const Piece*)(tokens + step % kBuffers * N * 2 * kStep);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int k = 0; k < kTiles; k += 2) {
        Piece b[2];
#pragma unroll
        for (int at = 0; at < 2; at++) b[at] = from[own_place<N>(j, k + at, lane)];
#pragma unroll
        for (int half = 0; half < 2; half++)
#pragma unroll
          for (int at = 0; at < 2; at++)
#pragma unroll
            for (int m = 0; m < 2; m++)
              add_product(sum[m][k + at], a + kLaneRows / 2 * m, 4 * j + 2 * half, word_of(b[at], 2 * half),
                          word_of(b[at], 2 * half + 1));
      }
  }

#pragma unroll
  for (int k = 0; k < kTiles; k++)
#pragma unroll
    for (int c = 0; c < kLaneTokens; c++) {
      const int token = kMmaTokens * k + token_of_sum(lane, c);
      if (token >= n) continue;
      const int to = order ? order[first + token] : first + token;
      const float scale = scales[to / share] * (1.f / kGrown);
#pragma unroll
      for (int r = 0; r < 8 / kLaneTokens; r++) {
        const int m = r * kLaneTokens / 4, at = r * kLaneTokens % 4 + c, row = warp * kWarpRows + 16 * m + row_of_sum(lane, at);
        if (row < n_own) y[(i64)to * n_rows + row] = sum[m][k][at] * scale;
      }
    }
}

// Blocks that a multiprocessor has room for; on AMD's, 64 KB of shared memory. There each is one warp of a SIMD.
constexpr int blocks_of(int n) { return MPL_WARP == 32 ? (n == 32 ? 3 : 2) : kMmaWarps * kSpanRing + n * 2 * kStep <= 32768 ? 2 : 1; }
#define MATMUL_MMA(N)                                                                                                              \
  extern "C" __global__ void __launch_bounds__(kMmaThreads, blocks_of(N))                                                         \
      matmul_mma_##N(const u8* w, i64 row_bytes, i64 mat_bytes, const int* tiles, const int* order, int share, const u16* x,       \
                     const float* scales, float* y, int n_rows, int n_in, int n_tokens) {                                          \
    matmul_mma<N>(w, row_bytes, mat_bytes, tiles, order, share, x, scales, y, n_rows, n_in, n_tokens);                             \
  }                                                                                                                                \
  MPL_EXPORT(matmul_mma_##N)
MATMUL_MMA(32)
MATMUL_MMA(64)
#endif
