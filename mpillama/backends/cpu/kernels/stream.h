// Speed of sequential reads, the limit of every kernel that reads weights once.
#pragma once
#include <cstddef>

#include "pool.h"

namespace mpillama {

double stream_gbps(Pool& pool, size_t n_bytes, double seconds);

}  // namespace mpillama
