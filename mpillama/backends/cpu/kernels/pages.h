// Memory for weights, and for what large products work on.
#pragma once
#include <cstddef>
#include <cstdint>

namespace mpillama {

// Zeros at first, aligned to 64 bytes, in huge pages where it is large enough for some. Throws std::bad_alloc.
class Pages {
 public:
  explicit Pages(size_t bytes);
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  uint8_t* data() const { return data_; }

 private:
  void* mapping_ = nullptr;
  size_t mapped_ = 0;
  uint8_t* data_ = nullptr;
};

}  // namespace mpillama
