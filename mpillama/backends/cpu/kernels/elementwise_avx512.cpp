#include "elementwise_simd_avx512.h"
// After the vectors.
#include "elementwise_impl.h"

namespace mpillama {

const ElementwiseKernels avx512_elementwise = elementwise_kernels;

}  // namespace mpillama
