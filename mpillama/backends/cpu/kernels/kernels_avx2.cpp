#include "vec_avx2.h"
// After the vectors.
#include "panel_avx2.h"
// After the products.
#include "kernels_impl.h"

namespace mpillama {

const Kernels avx2_kernels = make_kernels();

}  // namespace mpillama
