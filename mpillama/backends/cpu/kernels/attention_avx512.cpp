#include "elementwise_simd_avx512.h"
// After the vectors.
#include "attention_impl.h"

namespace mpillama {

const AttentionKernels avx512_attention = attention_kernels;

}  // namespace mpillama
