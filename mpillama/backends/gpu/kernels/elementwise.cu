// Ops that look at each element, row or head by itself.
#include "activation.cuh"
#include "round.cuh"

#define THREAD_ID ((i64)blockIdx.x * blockDim.x + threadIdx.x)

struct __align__(16) Four { float v[4]; };
MPL_INLINE Four four_at(const float* p, i64 i) { return ((const Four*)p)[i]; }
MPL_INLINE Four sum_of(Four a, const Four& b) {
#pragma unroll
  for (int i = 0; i < 4; i++) a.v[i] += b.v[i];
  return a;
}

// Columns before `before` and after the n of x are zeros.
extern "C" __global__ void __launch_bounds__(256)
    quantize(const float* x, int n, int before, int n_sub, i64 n_units, int* xq, float* xd, float* xs) {
  const i64 id = THREAD_ID, unit = id / 8;
  const int part = id % 8;
  const bool here = unit < n_units;
  const float* row = x + (here ? unit / n_sub * n : 0);
  const int col = (int)(unit % n_sub) * 32 + part * 4 - before;
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = here && col + i >= 0 && col + i < n ? row[col + i] : 0.f;
  round_four(v, here, unit, part, xq, xd, xs);
}
MPL_EXPORT(quantize)

// out (rows, n_out) has x (rows, n) from column `before` on, and zeros elsewhere.
extern "C" __global__ void pad(const float* x, int n, int before, int n_out, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const int col = (int)(id % n_out) - before;
  out[id] = col >= 0 && col < n ? x[id / n_out * n + col] : 0.f;
}
MPL_EXPORT(pad)

// As pad, in float16, each row divided by a power of 2 (in `scales`) that brings its largest number below 2^15: CDNA 2 counts what
// is below 2^-14 as zeros.
extern "C" __global__ void halve(const float* x, int n, int before, int n_out, u16* out, float* scales) {
  __shared__ float scratch[32];
  x += (i64)blockIdx.x * n;
  float top = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) top = fmaxf(top, fabsf(x[i]));
  top = block_max(top, scratch);
  const float scale = top >= 1e-30f ? as_float(as_bits(top) & 0x7F800000u) / 16384.f : 1.f, inverse = 1.f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  for (int i = threadIdx.x; i < n_out; i += blockDim.x) {
    const int col = i - before;
    out[(i64)blockIdx.x * n_out + i] = float_to_half(col >= 0 && col < n ? x[col] * inverse : 0.f);
  }
}
MPL_EXPORT(halve)

// -- two arrays of up to three axes, n0 x n1 x n2 elements; a stride of 0 repeats. op 0 adds, 1 multiplies.
extern "C" __global__ void binary(int op, const float* a, const float* b, float* out, i64 size, int n1, int n2, i64 a0, i64 a1,
                                  i64 a2, i64 b0, i64 b1, i64 b2) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const i64 i2 = id % n2, i1 = id / n2 % n1, i0 = id / n2 / n1;
  const float u = a[i0 * a0 + i1 * a1 + i2 * a2], v = b[i0 * b0 + i1 * b1 + i2 * b2];
  out[id] = op ? u * v : u + v;
}
MPL_EXPORT(binary)

// op 0: x * number; 1: logistic function; 2: number * tanh(x / number).
extern "C" __global__ void unary(int op, const float* x, float number, float* out, i64 size) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const float v = x[id];
  out[id] = op == 0 ? v * number : op == 1 ? logistic(v) : number * tanhf(v / number);
}
MPL_EXPORT(unary)

// op: see `gate_with`.
extern "C" __global__ void gated(int op, const float* gate, const float* up, float* out, i64 size) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = gate_with(op, gate[id], up[id]);
}
MPL_EXPORT(gated)

// The same for rows of whole sub-blocks, `fours` of four elements each, which are left in 8 bits too. `size` counts fours of all
// rows; a thread has one. With `index`, rows of two tables are added to gate and up before.
extern "C" __global__ void __launch_bounds__(256)
    gated_rounded(int op, const float* gate, const float* up, const float* gate_table, const float* up_table, const int* index,
                  int fours, i64 size, float* out, int* xq, float* xd, float* xs) {
  const i64 id = THREAD_ID;
  const bool here = id < size;
  Four v = {};
  if (here) {
    Four g = four_at(gate, id), u = four_at(up, id);
    if (index) {
      const i64 at = (i64)index[id / fours] * fours + id % fours;
      g = sum_of(g, four_at(gate_table, at)), u = sum_of(u, four_at(up_table, at));
    }
#pragma unroll
    for (int i = 0; i < 4; i++) v.v[i] = gate_with(op, g.v[i], u.v[i]);
    ((Four*)out)[id] = v;
  }
  round_four(v.v, here, id / 8, (int)(id % 8), xq, xd, xs);
}
MPL_EXPORT(gated_rounded)

// out (rows, n): row index[i] of table.
extern "C" __global__ void gather_rows(const float* table, const int* index, int n, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = table[(i64)index[id / n] * n + id % n];
}
MPL_EXPORT(gather_rows)

// out (rows, n): x, to which row index[i] of table is added, if that is one.
extern "C" __global__ void add_rows(const float* x, const float* table, const int* index, int n, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const int row = index[id / n];
  out[id] = row < 0 ? x[id] : x[id] + table[(i64)row * n + id % n];
}
MPL_EXPORT(add_rows)

// Rows of n pieces: row source[i] of one array to row target[i] of another or the same; null stands for i.
extern "C" __global__ void move_rows(const u8* from, const int* source, u8* to, const int* target, int n, i64 size) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const i64 row = id / n, col = id % n;
  ((Piece*)to)[(target ? target[row] : row) * n + col] = ((const Piece*)from)[(source ? source[row] : row) * n + col];
}
MPL_EXPORT(move_rows)

// Columns start to start + n_part of out (rows, n): part (rows, n_part).
extern "C" __global__ void put_columns(const float* part, int n_part, int start, int n, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id / n_part * n + start + id % n_part] = part[id];
}
MPL_EXPORT(put_columns)

// index - start, or -1 outside of start to stop.
extern "C" __global__ void held(const int* index, int start, int stop, i64 size, int* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = index[id] >= start && index[id] < stop ? index[id] - start : -1;
}
MPL_EXPORT(held)

// Between float32 and 16 bits: bfloat16, or float16.
extern "C" __global__ void narrow(const float* x, int bf16, i64 size, u16* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = bf16 ? float_to_bf16(x[id]) : float_to_half(x[id]);
}
MPL_EXPORT(narrow)

extern "C" __global__ void widen(const u16* x, int bf16, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = bf16 ? bf16_to_float(x[id]) : half_to_float(x[id]);
}
MPL_EXPORT(widen)

extern "C" __global__ void to_float(const int* x, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = (float)x[id];
}
MPL_EXPORT(to_float)

extern "C" __global__ void to_int(const float* x, i64 size, int* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = (int)x[id];
}
MPL_EXPORT(to_int)

// out (T, n): the sum over K of weights (T, K) times x (T, K, n).
extern "C" __global__ void sum_experts(const float* x, const float* weights, int n_used, int n, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const i64 token = id / n, col = id % n;
  float sum = 0.f;
  for (int k = 0; k < n_used; k++) sum += weights[token * n_used + k] * x[(token * n_used + k) * n + col];
  out[id] = sum;
}
MPL_EXPORT(sum_experts)

// -- norms. Short rows (heads) have a warp each, long ones a block.
// The sum over a block; all threads get it. A kernel may call each CALL once, since warps may still read what it has left.
template <int CALL> MPL_INLINE float row_sum(float v) {
  __shared__ float scratch[32];
  const int lane = threadIdx.x % MPL_WARP, n_warps = blockDim.x / MPL_WARP;
  v = lanes_sum<MPL_WARP>(v);
  if (n_warps == 1) return v;
  if (lane == 0) scratch[threadIdx.x / MPL_WARP] = v;
  __syncthreads();
  return lanes_sum<32>(lane % 32 < n_warps ? scratch[lane % 32] : 0.f);
}

MPL_INLINE void scale_row(const float* x, const float* w, float factor, int n, float* out, int first, int step) {
  for (int i = first; i < n; i += step) out[i] = x[i] * factor * w[i];
}

extern "C" __global__ void rms_norm_short(const float* x, const float* w, float eps, int n, i64 n_rows, float* out) {
  const i64 row = THREAD_ID / MPL_WARP;
  const int lane = threadIdx.x % MPL_WARP;
  if (row >= n_rows) return;
  const float* r = x + row * n;
  float sum = 0.f;
  for (int i = lane; i < n; i += MPL_WARP) sum += r[i] * r[i];
  sum = lanes_sum<MPL_WARP>(sum);
  scale_row(r, w, 1.f / sqrtf(sum / (float)n + eps), n, out + row * n, lane, MPL_WARP);
}
MPL_EXPORT(rms_norm_short)

extern "C" __global__ void rms_norm_long(const float* x, const float* w, float eps, int n, float* out) {
  const float* r = x + (i64)blockIdx.x * n;
  float sum = 0.f;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += r[i] * r[i];
  sum = row_sum<0>(sum);
  scale_row(r, w, 1.f / sqrtf(sum / (float)n + eps), n, out + (i64)blockIdx.x * n, threadIdx.x, blockDim.x);
}
MPL_EXPORT(rms_norm_long)

// A branch joins the residual, and the sum is normed: total = h + factor x, out = total / rms(total) * w. A block has a row
// of n elements (a multiple of 4), and a thread C fours of it, which stay in registers.
//
// Where they are given: `bias` (n) is added to x, or rows of it as `index` (T, K) says; `weights` (T, K) makes x the weighted sum
// of x (T, K, n); by `post` x is normed first; without h, x alone is normed, and total may be null; xq gets out in 8 bits, if rows
// are whole sub-blocks.
template <int C>
MPL_INLINE void add_norm(const float* h, const float* x, const float* bias, const int* index, const float* weights, int n_used,
                         const float* post, float factor, const float* w, float eps, int n, float* total, float* out, int* xq, float* xd, float* xs) {
  const int fours = n / 4, step = blockDim.x;
  const i64 first = (i64)blockIdx.x * fours;
  // What does not wait for a sum is on its way before the first one, as far as there are registers for it.
  constexpr bool kEarly = C < 4;
  Four v[C], old[C], scale[C];
  float sum = 0.f;
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int at = threadIdx.x + c * step;
    v[c] = old[c] = scale[c] = Four{};
    if (at >= fours) continue;
    if (kEarly) scale[c] = four_at(w, at);
    if (kEarly && h) old[c] = four_at(h, first + at);
    if (!weights) {
      v[c] = four_at(x, first + at);
      if (bias) v[c] = sum_of(v[c], four_at(bias, at));
    } else
#pragma unroll 2
      for (int k = 0; k < n_used; k++) {
        const i64 pair = (i64)blockIdx.x * n_used + k;
        Four answer = four_at(x, pair * fours + at);
        if (bias) answer = sum_of(answer, four_at(bias, (i64)index[pair] * fours + at));
        const float weight = weights[pair];
#pragma unroll
        for (int i = 0; i < 4; i++) v[c].v[i] += weight * answer.v[i];
      }
  }
  if (post) {
#pragma unroll
    for (int c = 0; c < C; c++)
#pragma unroll
      for (int i = 0; i < 4; i++) sum += v[c].v[i] * v[c].v[i];
    const float inverse = 1.f / sqrtf(row_sum<0>(sum) / (float)n + eps);
    sum = 0.f;
#pragma unroll
    for (int c = 0; c < C; c++) {
      const int at = threadIdx.x + c * step;
      if (at >= fours) continue;
      const Four p = four_at(post, at);
#pragma unroll
      for (int i = 0; i < 4; i++) v[c].v[i] = v[c].v[i] * inverse * p.v[i];
    }
  }
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int at = threadIdx.x + c * step;
    if (!kEarly && h && at < fours) old[c] = four_at(h, first + at);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      v[c].v[i] = h ? old[c].v[i] + factor * v[c].v[i] : v[c].v[i];
      sum += v[c].v[i] * v[c].v[i];
    }
    if (total && at < fours) ((Four*)total)[first + at] = v[c];
  }
  const float inverse = 1.f / sqrtf(row_sum<1>(sum) / (float)n + eps);
#pragma unroll
  for (int c = 0; c < C; c++) {
    const int at = threadIdx.x + c * step;
    if (!kEarly && at < fours) scale[c] = four_at(w, at);
#pragma unroll
    for (int i = 0; i < 4; i++) v[c].v[i] = v[c].v[i] * inverse * scale[c].v[i];
    if (at < fours) ((Four*)out)[first + at] = v[c];
    if (xq) round_four(v[c].v, at < fours, (first + at) / 8, at % 8, xq, xd, xs);
  }
}

#define ADD_NORM(C)                                                                                                           \
  extern "C" __global__ void __launch_bounds__(1024)                                                                          \
      add_norm_##C(const float* h, const float* x, const float* bias, const int* index, const float* weights, int n_used,     \
                   const float* post, float factor, const float* w, float eps, int n, float* total, float* out, int* xq,      \
                   float* xd, float* xs) {                                                                                    \
    add_norm<C>(h, x, bias, index, weights, n_used, post, factor, w, eps, n, total, out, xq, xd, xs);                         \
  }                                                                                                                           \
  MPL_EXPORT(add_norm_##C)
ADD_NORM(1)
ADD_NORM(2)
ADD_NORM(4)

// out (rows): the sum of squares of columns [start, stop).
extern "C" __global__ void sum_squares(const float* x, int n, int start, int stop, float* out) {
  const float* r = x + (i64)blockIdx.x * n;
  float sum = 0.f;
  for (int i = start + threadIdx.x; i < stop; i += blockDim.x) sum += r[i] * r[i];
  sum = row_sum<0>(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = sum;
}
MPL_EXPORT(sum_squares)

extern "C" __global__ void scale_by_mean_square(const float* x, const float* mean, const float* w, float eps, int n, i64 size,
                                                float* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = x[id] * (1.f / sqrtf(mean[id / n] + eps)) * w[id % n];
}
MPL_EXPORT(scale_by_mean_square)

// -- rope. Angles are float64 until they are within a turn: positions go up to millions.
extern "C" __global__ void rope_table(const int* positions, const double* frequencies, float factor, int half, i64 size,
                                      float* cosines, float* sines) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const double angle = (double)positions[id / half] * frequencies[id % half];
  const float rest = (float)(angle - floor(angle * 0.15915494309189535) * 6.283185307179586);
  cosines[id] = cosf(rest) * factor;
  sines[id] = sinf(rest) * factor;
}
MPL_EXPORT(rope_table)

// log(floor(position / span) + 1) * scale + 1 for each token.
extern "C" __global__ void attn_temperature(const int* positions, double span, double scale, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id < size) out[id] = (float)(log(floor((double)positions[id] / span) + 1.0) * scale + 1.0);
}
MPL_EXPORT(attn_temperature)

// Heads x (T, H, D); `half` pairs of the first elements turn, the rest stays. A thread has a pair or a single element.
extern "C" __global__ void rope(const float* x, const float* cosines, const float* sines, int neox, int half, int n_dim,
                                int n_head, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const int units = n_dim - half, unit = (int)(id % units);
  const i64 head = id / units, token = head / n_head;
  x += head * n_dim;
  out += head * n_dim;
  if (unit >= half) {
    out[half + unit] = x[half + unit];
    return;
  }
  const int i = neox ? unit : 2 * unit, j = neox ? unit + half : 2 * unit + 1;
  const float c = cosines[token * half + unit], s = sines[token * half + unit], a = x[i], b = x[j];
  out[i] = a * c - b * s;
  out[j] = a * s + b * c;
}
MPL_EXPORT(rope)

// Adds n parts (n, size) up, in their order.
extern "C" __global__ void sum_parts(const float* parts, int n, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  float v = parts[id];
  for (int i = 1; i < n; i++) v += parts[i * size + id];
  out[id] = v;
}
MPL_EXPORT(sum_parts)

// out (cols, rows) = x (rows, cols) transposed, times the factor of each of its columns.
extern "C" __global__ void transpose_scaled(const float* x, const float* factors, int rows, int cols, i64 size, float* out) {
  const i64 id = THREAD_ID;
  if (id >= size) return;
  const i64 row = id % rows, col = id / rows;
  out[id] = x[row * cols + col] * factors[col];
}
MPL_EXPORT(transpose_scaled)
