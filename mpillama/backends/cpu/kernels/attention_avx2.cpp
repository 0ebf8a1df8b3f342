#include "elementwise_simd_avx2.h"
// After the vectors.
#include "attention_impl.h"
#include "attention_panels.h"

namespace mpillama {

const AttentionKernels avx2_attention{store_keys, store_values, attend<attend_panels>, combine, 2 * panel_rows};

}  // namespace mpillama
