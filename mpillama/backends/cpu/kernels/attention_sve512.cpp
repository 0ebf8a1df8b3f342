#include "elementwise_simd_sve512.h"
// After the vectors.
#include "attention_impl.h"
#include "attention_panels.h"

namespace mpillama {

const AttentionKernels sve512_attention{store_keys, store_values, attend<attend_panels>, combine, 2 * panel_rows};

}  // namespace mpillama
