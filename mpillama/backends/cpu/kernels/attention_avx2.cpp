#include "elementwise_simd_avx2.h"
// After the vectors.
#include "attention_impl.h"

namespace mpillama {

const AttentionKernels avx2_attention = attention_kernels;

}  // namespace mpillama
