#include "vec_scalar.h"
// After the vectors.
#include "kernels_impl.h"

namespace mpillama {

const Kernels scalar_kernels = make_kernels();

}  // namespace mpillama
