#include "vec_sve512.h"
// After the vectors.
#include "panel_impl.h"
// After the products.
#include "kernels_impl.h"

namespace mpillama {

const Kernels sve512_kernels = make_kernels();

}  // namespace mpillama
