#include "pack_impl.h"

namespace mpillama {

PackFn avx2_pack(int type) { return pack_fn(type); }

}  // namespace mpillama
