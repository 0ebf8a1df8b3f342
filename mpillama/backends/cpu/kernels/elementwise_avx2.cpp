#include "elementwise_simd_avx2.h"
// After the vectors.
#include "elementwise_impl.h"

namespace mpillama {

const ElementwiseKernels avx2_elementwise = elementwise_kernels;

}  // namespace mpillama
