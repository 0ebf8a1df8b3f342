#include "vec_avx512.h"
// After the vectors.
#include "panel_impl.h"
// After the products.
#include "kernels_impl.h"

namespace mpillama {

const Kernels avx512_kernels = make_kernels();

}  // namespace mpillama
