// Mixtures of experts: choosing them, and collecting the tokens of each.
#include "compat.cuh"

// Chooses, for each token, the n_used experts of the largest logits, among equals the first. One warp to a token.
// `bias` (n_expert) is added to the logits, if it is given;
// softmax over all logits before choosing, or over the chosen ones; then, if asked, weights are made to sum to 1.
extern "C" __global__ void route(const float* logits, const float* bias, int n_expert, int n_used, int over_all, int normalize, int* experts,
                                 float* weights) {
  MPL_DYN_SHARED(float, left);
  const int lane = threadIdx.x;
  logits += (i64)blockIdx.x * n_expert;
  experts += (i64)blockIdx.x * n_used;
  weights += (i64)blockIdx.x * n_used;
  float top = -MPL_INF;
  for (int i = lane; i < n_expert; i += MPL_WARP) {
    left[i] = logits[i] + (bias ? bias[i] : 0.f);
    top = fmaxf(top, left[i]);
  }
  top = lanes_max<MPL_WARP>(top);
  float total = 0.f;
  if (over_all) {
    for (int i = lane; i < n_expert; i += MPL_WARP) total += expf(left[i] - top);
    total = lanes_sum<MPL_WARP>(total);
  }
  float chosen = 0.f, mine = 0.f;
  for (int k = 0; k < n_used; k++) {
    float best = -MPL_INF;
    int at = n_expert;
    for (int i = lane; i < n_expert; i += MPL_WARP)
      if (left[i] > best || at == n_expert) best = left[i], at = i;
    for (int m = MPL_WARP / 2; m > 0; m /= 2) {
      const float other = MPL_SHFL_XOR(best, m);
      const int where = MPL_SHFL_XOR(at, m);
      if (where < n_expert && (at == n_expert || other > best || (other == best && where < at))) best = other, at = where;
    }
    // The lane that owns the element takes it out; no other reads it.
    if (at % MPL_WARP == lane) left[at] = -MPL_INF;
    const float weight = expf(best - top);
    chosen += weight;
    if (lane == k % MPL_WARP) mine = weight;
    if (lane == 0) experts[k] = at;
    if (k % MPL_WARP == MPL_WARP - 1 || k == n_used - 1) {
      const int first = k / MPL_WARP * MPL_WARP;
      if (first + lane <= k) weights[first + lane] = mine;
    }
  }
  const float all = over_all ? total : chosen;
  // Each lane reads the weights that it wrote.
  const float sum = normalize ? fmaxf(chosen / all, 6.103515625e-5f) : 1.f;
  for (int k = lane; k < n_used; k += MPL_WARP) weights[k] = weights[k] / all / sum;
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
