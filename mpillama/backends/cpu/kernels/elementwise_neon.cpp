#include "elementwise_simd_neon.h"
// After the vectors.
#include "elementwise_impl.h"

namespace mpillama {

const ElementwiseKernels neon_elementwise = elementwise_kernels;

}  // namespace mpillama
