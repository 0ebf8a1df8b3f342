#include "vec_scalar.h"
// After the vectors.
#include "panel_impl.h"
// After the products.
#include "kernels_impl.h"

namespace mpillama {

const Kernels scalar_kernels = make_kernels();

}  // namespace mpillama
