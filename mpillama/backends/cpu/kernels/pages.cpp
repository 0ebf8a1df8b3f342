#include "pages.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace mpillama {
namespace {

constexpr size_t huge = size_t(2) << 20;

}  // namespace

Pages::Pages(size_t bytes) {
  if (bytes == 0) return;
#if defined(__linux__)
  if (bytes >= huge) {
    mapped_ = bytes + huge;
    mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapping_ == MAP_FAILED) {
      mapping_ = nullptr;
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(mapping_) + huge - 1) / huge * huge);
    madvise(data_, bytes, MADV_HUGEPAGE);
    return;
  }
#endif
  data_ = static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  if (!data_) throw std::bad_alloc();
  std::memset(data_, 0, (bytes + 63) / 64 * 64);
}

Pages::~Pages() {
#if defined(__linux__)
  if (mapping_) {
    munmap(mapping_, mapped_);
    return;
  }
#endif
  std::free(data_);
}

}  // namespace mpillama
