#include "vec_neon.h"
// After the vectors.
#include "panel_i8mm.h"
// After the products.
#include "kernels_impl.h"

namespace mpillama {

const Kernels i8mm_kernels = make_kernels();

}  // namespace mpillama
