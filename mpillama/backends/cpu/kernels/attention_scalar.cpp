#include "elementwise_simd_scalar.h"
// After the vectors.
#include "attention_impl.h"

namespace mpillama {

const AttentionKernels scalar_attention = attention_kernels;

}  // namespace mpillama
