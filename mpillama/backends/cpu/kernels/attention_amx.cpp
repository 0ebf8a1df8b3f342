#include "elementwise_simd_avx512.h"
// After the vectors.
#include "attention_amx.h"

namespace mpillama {

const AttentionKernels amx_attention{store_keys, store_values, attend<attend_many>, combine, 4 * panel_rows};

}  // namespace mpillama
