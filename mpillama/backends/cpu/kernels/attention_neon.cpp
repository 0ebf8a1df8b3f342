#include "elementwise_simd_neon.h"
// After the vectors.
#include "attention_impl.h"

namespace mpillama {

const AttentionKernels neon_attention = attention_kernels;

}  // namespace mpillama
