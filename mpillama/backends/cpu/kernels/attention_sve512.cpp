#include "elementwise_simd_sve512.h"
// After the vectors.
#include "attention_impl.h"

namespace mpillama {

const AttentionKernels sve512_attention = attention_kernels;

}  // namespace mpillama
