// Products of one weight type, MPL_TYPE, straight from the blocks of the file, and its rows as floats.
//
// Quantized weights meet activations rounded to 8 bits (`quantize` in elementwise.cu): xq (T, subs, 8) words of four, xd
// (T, subs) their scales, xs (T, subs, 2) the scaled sums of 16, which minima need. Floating-point weights meet float32.
// A product for few tokens (matvec.cuh) reads each weight once; one for many works on tiles: on matrix units (matmul_mma.cuh), or
// here, of 64 rows and 32 tokens. With experts, tokens are pairs (token, choice), and the pairs of an expert are tiles of their own.
#include "matmul_mma.cuh"
#include "matvec.cuh"

// Rows as floats: out (n, 32 n_sub) of rows index[i] - first, or i where index is null; zeros for rows outside of [0, n_rows).
#define DEQUANTIZE(name, T, STORE)                                                                                     \
  extern "C" __global__ void name(const u8* w, i64 row_bytes, const int* index, int first, T* out, int n_in,           \
                                  int n_rows) {                                                                        \
    const int unit = blockIdx.x * blockDim.x + threadIdx.x, i = blockIdx.y;                                            \
    const int row = index ? index[i] - first : i;                                                                      \
    if (unit * kUnit >= n_in) return;                                                                                  \
    T* to = out + (i64)i * n_in + (i64)unit * kUnit;                                                                   \
    float v[kUnit];                                                                                                    \
    floats_of(w + (i64)row * row_bytes, unit, row >= 0 && row < n_rows, v);                                            \
    _Pragma("unroll") for (int j = 0; j < kUnit; j++) to[j] = STORE(v[j]);                                             \
  }                                                                                                                    \
  MPL_EXPORT(name)

#if MPL_FLOAT
constexpr int kUnit = 1;
MPL_INLINE void floats_of(const u8* row, int unit, bool here, float* v) { v[0] = here ? weight_at(row, unit) : 0.f; }
#else
constexpr int kUnit = 32;
MPL_INLINE void floats_of(const u8* row, int unit, bool here, float* v) {
  Sub s;
  if (here) decode(row, unit, s);
#pragma unroll
  for (int j = 0; j < 32; j++) {
    const float q = (float)(i8)(s.q[j / 4] >> 8 * (j % 4));
    v[j] = !here ? 0.f : kMin ? s.scale[j / 16] * q - s.min[j / 16] : s.scale[j / 16] * q;
  }
}
#endif
DEQUANTIZE(dequantize_f32, float, )
DEQUANTIZE(dequantize_f16, u16, float_to_half)

#if !MPL_FLOAT
// Two scales and two minima of weights; scale and sums of activations.
struct Factors { float v[4]; };
MPL_INLINE Factors factors(Piece q) { return {{as_float(q.x), as_float(q.y), as_float(q.z), as_float(q.w)}}; }

// What 32 weights add to the product with one token's activations.
MPL_INLINE float dot_sub(const Sub& s, const int* a, float d, const float* sums) {
  int low = 0, high = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) low = dot4(s.q[i], a[i], low);
#pragma unroll
  for (int i = 4; i < 8; i++) (kHalves ? high : low) = dot4(s.q[i], a[i], kHalves ? high : low);
  float v = s.scale[0] * (float)low;
  if (kHalves) v += s.scale[1] * (float)high;
  v *= d;
  if (kMin) v -= s.min[0] * sums[0] + s.min[1] * sums[1];
  return v;
}
#endif

// -- many tokens: 256 threads, each with 8 sums of a tile, 4 rows by 2 tokens.
constexpr int kRows = 64, kTokens = 32;
MPL_INLINE int row_of(int i) { return threadIdx.x % 16 + i / 2 * 16; }
MPL_INLINE int token_of(int i) { return threadIdx.x / 16 + i % 2 * 16; }

// tiles: see `tile_of`; `order`: the pairs, by expert.
extern "C" __global__ void __launch_bounds__(256, 2)
    matmul(const u8* w, i64 row_bytes, i64 mat_bytes, const int* tiles, const int* order, int share, X_ARGS, float* y, int n_rows,
           int n_in, int n_tokens) {
  const Tile tile = tile_of(tiles, kTokens, n_tokens);
  const int first = tile.first, n = tile.n;
  if (n == 0) return;
  // Without columns, all sums are zero.
  if (tile.expert < 0) n_in = 0;
  else w += tile.expert * mat_bytes;
  const int t = threadIdx.x, row0 = blockIdx.x * kRows;
  float sum[8] = {};
#if MPL_FLOAT
  constexpr int kDepth = 32;
  MPL_DYN_SHARED(float, shared);
  float *ws = shared, *xs = shared + kRows * (kDepth + 1);
  for (int i0 = 0; i0 < n_in; i0 += kDepth) {
    const int depth = min(kDepth, n_in - i0);
    for (int i = t; i < kRows * kDepth; i += 256) {
      const int row = i / kDepth, col = i % kDepth;
      const bool here = row0 + row < n_rows && col < depth;
      ws[row * (kDepth + 1) + col] = here ? weight_at(w + (i64)(row0 + row) * row_bytes, i0 + col) : 0.f;
    }
    for (int i = t; i < kTokens * kDepth; i += 256) {
      const int token = i / kDepth, col = i % kDepth;
      float v = 0.f;
      if (token < n && col < depth) v = x[(i64)((order ? order[first + token] : first + token) / share) * n_in + i0 + col];
      xs[token * (kDepth + 1) + col] = v;
    }
    __syncthreads();
    for (int i = 0; i < depth; i++)
#pragma unroll
      for (int k = 0; k < 8; k++) sum[k] += ws[row_of(k) * (kDepth + 1) + i] * xs[token_of(k) * (kDepth + 1) + i];
    __syncthreads();
  }
#else
  constexpr int kSubs = 4;
  // Of each sub-block the 8 words of all rows, 12 apart, and of all tokens; then their factors, four each. What 8 neighbouring
  // lanes write (2 rows, 4 sub-blocks) lies in different banks.
  constexpr int kStride = 12, kPlane = kRows * kStride + 8, kTokenPlane = kTokens * kStride + 8;
  constexpr int kFactors = kRows + 2, kTokenFactors = kTokens + 2;
  MPL_DYN_SHARED(int, shared);
  int *wq = shared, *aq = wq + kSubs * kPlane;
  Piece *wf = (Piece*)(aq + kSubs * kTokenPlane), *af = wf + kSubs * kFactors;
  const int n_sub = n_in / 32;
  for (int s0 = 0; s0 < n_sub; s0 += kSubs) {
    const int part = t % kSubs, sub = s0 + part, at_row = t / kSubs;
    {
      Sub s = {};
      if (row0 + at_row < n_rows && sub < n_sub) decode(w + (i64)(row0 + at_row) * row_bytes, sub, s);
      Piece* to = (Piece*)(wq + part * kPlane + at_row * kStride);
      to[0] = piece_of(s.q[0], s.q[1], s.q[2], s.q[3]), to[1] = piece_of(s.q[4], s.q[5], s.q[6], s.q[7]);
      wf[part * kFactors + at_row] = piece_of(as_bits(s.scale[0]), as_bits(s.scale[1]), as_bits(s.min[0]), as_bits(s.min[1]));
    }
    if (at_row < kTokens) {
      const bool here = at_row < n && sub < n_sub;
      const i64 at = here ? (i64)((order ? order[first + at_row] : first + at_row) / share) * n_sub + sub : 0;
      const Piece none = piece_of(0, 0, 0, 0);
      Piece* to = (Piece*)(aq + part * kTokenPlane + at_row * kStride);
      to[0] = here ? ((const Piece*)xq)[2 * at] : none, to[1] = here ? ((const Piece*)xq)[2 * at + 1] : none;
      const Piece known = here ? piece_of(as_bits(xd[at]), as_bits(xs[2 * at]), as_bits(xs[2 * at + 1]), 0) : none;
      af[part * kTokenFactors + at_row] = known;
    }
    __syncthreads();
    for (int i = 0; i < kSubs; i++) {
#pragma unroll
      for (int a = 0; a < 8; a += 2) {
        const int* from = wq + i * kPlane + row_of(a) * kStride;
        const Factors f = factors(wf[i * kFactors + row_of(a)]);
        Sub s = {{}, {f.v[0], f.v[1]}, {f.v[2], f.v[3]}};
#pragma unroll
        for (int j = 0; j < 8; j++) s.q[j] = from[j];
#pragma unroll
        for (int k = a; k < a + 2; k++) {
          const Factors x = factors(af[i * kTokenFactors + token_of(k)]);
          sum[k] += dot_sub(s, aq + i * kTokenPlane + token_of(k) * kStride, x.v[0], x.v + 1);
        }
      }
    }
    __syncthreads();
  }
#endif
#pragma unroll
  for (int k = 0; k < 8; k++) {
    const int token = token_of(k), row = row0 + row_of(k);
    if (token < n && row < n_rows) y[(i64)(order ? order[first + token] : first + token) * n_rows + row] = sum[k];
  }
}
MPL_EXPORT(matmul)
