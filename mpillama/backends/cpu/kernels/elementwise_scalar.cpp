#include "elementwise_simd_scalar.h"
// After the vectors.
#include "elementwise_impl.h"

namespace mpillama {

const ElementwiseKernels scalar_elementwise = elementwise_kernels;

}  // namespace mpillama
