// Mixtures of experts: choosing them, and collecting the tokens of each.
#include "compat.cuh"

struct __align__(16) FourWords { u32 v[4]; };

// Numbers in their order, NaN the largest; never 0.
MPL_INLINE u32 order_of(float value) {
  const u32 bits = value != value ? 0x7FFFFFFFu : as_bits(value + 0.f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// How many of a warp's numbers are larger than mine, or with TIES as large and on a lower lane.
template <bool TIES> MPL_INLINE int larger(const u32* order, u32 mine, int lane) {
  int n = 0;
#pragma unroll
  for (int j = 0; j < MPL_WARP; j += 4) {
    const FourWords other = *(const FourWords*)(order + j);
#pragma unroll
    for (int k = 0; k < 4; k++) n += other.v[k] > (TIES && j + k < lane ? mine - 1 : mine);
  }
  return n;
}

// Chooses, for each token, the n_used experts of the largest logits, among equals the first; `bias` (n_expert) is added to the
// logits, if it is given. softmax over all logits before choosing, or over the chosen ones; then, if asked, weights are made to
// sum to 1. One block to a token. A thread counts what comes before its expert, which takes no turns as choosing one after the
// other does.
extern "C" __global__ void __launch_bounds__(256) route(const float* logits, const float* bias, int n_expert, int n_used,
                                                        int over_all, int normalize, int* experts, float* weights) {
  // Of the experts, then zeros up to whole warps; then the powers of the n_used chosen ones; then 32 words for sums.
  MPL_DYN_SHARED(u32, order);
  const int padded = (n_expert + MPL_WARP - 1) / MPL_WARP * MPL_WARP, lane = threadIdx.x % MPL_WARP;
  float *chosen = (float*)(order + padded), *scratch = chosen + n_used, top = -MPL_INF, total = 0.f;
  logits += (i64)blockIdx.x * n_expert;
  experts += (i64)blockIdx.x * n_used;
  weights += (i64)blockIdx.x * n_used;
  for (int i = threadIdx.x; i < padded; i += blockDim.x) {
    const float logit = i < n_expert ? logits[i] + (bias ? bias[i] : 0.f) : -MPL_INF;
    order[i] = i < n_expert ? order_of(logit) : 0;
    top = fmaxf(top, logit);
  }
  top = block_max(top, scratch);
  __syncthreads();
  for (int i = threadIdx.x; i < n_expert; i += blockDim.x) {
    const u32 mine = order[i];
    const float power = expf(logits[i] + (bias ? bias[i] : 0.f) - top);
    total += power;
    // Of equal ones, those with smaller numbers come before too: of other warps' experts all or none.
    int before = 0;
    for (int first = 0; first < padded; first += MPL_WARP)
      before += first == i - lane ? larger<true>(order + first, mine, lane) : larger<false>(order + first, mine - (first < i), lane);
    if (before < n_used) experts[before] = i, chosen[before] = power;
  }
  if (over_all) total = block_sum(total, scratch);
  __syncthreads();
  float sum = 0.f;
  for (int k = 0; k < n_used; k++) sum += chosen[k];
  const float all = over_all ? total : sum, rest = normalize ? fmaxf(sum / all, 6.103515625e-5f) : 1.f;
  for (int k = threadIdx.x; k < n_used; k += blockDim.x) weights[k] = chosen[k] / all / rest;
}
MPL_EXPORT(route)

// Sorts pairs by expert: order (n_pairs) and tiles (n_tiles, 3) of at most `size` pairs of one expert: expert, first, count;
// tiles that are not needed have count 0. Pairs whose expert is negative come last, in tiles of expert -1. One block.
extern "C" __global__ void group_pairs(const int* experts, int n_pairs, int n_expert, int size, int n_tiles, int* order, int* tiles) {
  MPL_DYN_SHARED(int, count);
  const int n_group = n_expert + 1;
  int *start = count + n_group, *tile = start + n_group;
  for (int e = threadIdx.x; e < n_group; e += blockDim.x) count[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n_pairs; i += blockDim.x) atomicAdd(&count[experts[i] < 0 ? n_expert : experts[i]], 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    int pairs = 0, used = 0;
    for (int e = 0; e < n_group; e++) {
      start[e] = pairs;
      tile[e] = used;
      pairs += count[e];
      used += (count[e] + size - 1) / size;
    }
    tile[n_group] = used;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < n_group; e += blockDim.x)
    for (int i = 0; i * size < count[e]; i++) {
      int* to = tiles + 3 * (tile[e] + i);
      to[0] = e < n_expert ? e : -1, to[1] = start[e] + i * size, to[2] = min(size, count[e] - i * size);
    }
  for (int i = tile[n_group] + threadIdx.x; i < n_tiles; i += blockDim.x) tiles[3 * i + 2] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < n_pairs; i += blockDim.x) order[atomicAdd(&start[experts[i] < 0 ? n_expert : experts[i]], 1)] = i;
}
MPL_EXPORT(group_pairs)
