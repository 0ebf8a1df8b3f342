#include "pack_impl.h"

namespace mpillama {

PackFn scalar_pack(int type) { return pack_fn(type); }

}  // namespace mpillama
