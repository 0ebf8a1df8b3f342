// The largest logits of each row.
#include "compat.cuh"

// Orders values, and of equal ones their columns backwards; 0 for -inf, which does not count. NaN is the largest.
MPL_INLINE u64 key_of(float value, int column) {
  if (value == -MPL_INF) return 0;
  const u32 bits = value != value ? 0x7FFFFFFFu : as_bits(value + 0.f);
  return (u64)(bits & 0x80000000u ? ~bits : bits | 0x80000000u) << 32 | ~(u32)column;
}

MPL_INLINE float value_of(u64 key) {
  const u32 order = (u32)(key >> 32);
  return key ? as_float(order & 0x80000000u ? order & 0x7FFFFFFFu : ~order) : -MPL_INF;
}

// A block sorts a chunk of TOP_CHUNK values of one row and keeps the k largest: out (rows, chunks, 2, k), values and columns.
// x is (rows, n), whose columns are counted from `first`, or with `merge` (rows, n / k, 2, k).
extern "C" __global__ void top_k(const float* x, int n, int k, int first, int merge, float* out) {
  MPL_DYN_SHARED(u64, keys);
  x += (i64)blockIdx.y * n * (merge ? 2 : 1);
  out += ((i64)blockIdx.y * gridDim.x + blockIdx.x) * 2 * k;
  for (int i = threadIdx.x; i < TOP_CHUNK; i += blockDim.x) {
    const int at = blockIdx.x * TOP_CHUNK + i;
    u64 key = 0;
    if (at < n && merge) {
      const float* value = x + (i64)(at / k) * 2 * k + at % k;
      key = key_of(value[0], (int)value[k]);
    } else if (at < n) {
      key = key_of(x[at], first + at);
    }
    keys[i] = key;
  }
  __syncthreads();
  // Bitonic: runs of `size` are sorted, in turn falling and rising.
  for (int size = 2; size <= TOP_CHUNK; size *= 2)
    for (int step = size / 2; step > 0; step /= 2) {
      for (int i = threadIdx.x; i < TOP_CHUNK / 2; i += blockDim.x) {
        const int low = 2 * i - (i & (step - 1)), high = low + step;
        const u64 a = keys[low], b = keys[high];
        if ((a < b) == !(low & size)) keys[low] = b, keys[high] = a;
      }
      __syncthreads();
    }
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    out[i] = value_of(keys[i]);
    out[k + i] = keys[i] ? (float)~(u32)keys[i] : -1.f;
  }
}
MPL_EXPORT(top_k)
