#include "vec_neon.h"
// After the vectors.
#include "panel_impl.h"
// After the products.
#include "kernels_impl.h"

namespace mpillama {

static_assert(!Vec::pairs, "compiled for more than this level has");
const Kernels dotprod_kernels = make_kernels();

}  // namespace mpillama
