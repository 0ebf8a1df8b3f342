#include "elementwise_simd_sve512.h"
// After the vectors.
#include "elementwise_impl.h"

namespace mpillama {

const ElementwiseKernels sve512_elementwise = elementwise_kernels;

}  // namespace mpillama
