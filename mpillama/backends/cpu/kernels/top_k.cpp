// The largest logits of each row.
#include "top_k.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <vector>

#include "elementwise.h"

namespace mpillama {
namespace {

constexpr float infinity = std::numeric_limits<float>::infinity();

// Orders values, and of equal ones their columns backwards. NaN is the largest.
uint64_t key_of(float value, uint32_t column) {
  uint32_t bits = 0x7fffffff;
  value += 0.0f;  // no negative zero
  if (value == value) std::memcpy(&bits, &value, sizeof bits);
  return uint64_t(bits >> 31 ? ~bits : bits | 0x80000000) << 32 | uint32_t(~column);
}

float value_of(uint64_t key) {
  const uint32_t order = uint32_t(key >> 32), bits = order >> 31 ? order & 0x7fffffff : ~order;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// The k largest keys that were added, and perhaps some more.
class Largest {
 public:
  explicit Largest(size_t k) : k_(k) { keys_.reserve(2 * k); }

  // What is not above it need not be added; -inf never.
  float bar() const { return bar_; }

  void add(float value, uint32_t column) {
    keys_.push_back(key_of(value, column));
    if (keys_.size() < 2 * k_) return;
    std::nth_element(keys_.begin(), keys_.begin() + std::ptrdiff_t(k_ - 1), keys_.end(), std::greater<>());
    keys_.resize(k_);
    bar_ = value_of(keys_.back());
  }

  void write(float* values, float* columns) {
    std::sort(keys_.begin(), keys_.end(), std::greater<>());
    for (size_t i = 0; i < k_; i++) {
      values[i] = i < keys_.size() ? value_of(keys_[i]) : -infinity;
      columns[i] = i < keys_.size() ? float(~uint32_t(keys_[i])) : -1.0f;
    }
  }

 private:
  size_t k_;
  float bar_ = -infinity;
  std::vector<uint64_t> keys_;
};

}  // namespace

void top_k(Pool& pool, const float* x, size_t n_rows, size_t n, size_t k, uint32_t first, float* out) {
  const auto lock = pool.lock();
  const auto first_above = elementwise_kernels_of(pool.level()).first_above;
  pool.parallel_for(n_rows, 1, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; row++) {
      const float* values = x + row * n;
      Largest largest(k);
      for (size_t i = 0; (i += first_above(values + i, n - i, largest.bar())) < n; i++)
        largest.add(values[i], first + uint32_t(i));
      largest.write(out + row * 2 * k, out + row * 2 * k + k);
    }
  });
}

void merge_top_k(Pool& pool, const float* x, size_t n_rows, size_t n_parts, size_t k, float* out) {
  const auto lock = pool.lock();
  pool.parallel_for(n_rows, 1, [&](size_t begin, size_t end) {
    for (size_t row = begin; row < end; row++) {
      Largest largest(k);
      for (size_t part = 0; part < n_parts; part++) {
        const float* values = x + (row * n_parts + part) * 2 * k;
        for (size_t i = 0; i < k && values[k + i] >= 0; i++)
          // Columns of a part that comes later may be lower, so equals of the bar are not left out.
          if (!(values[i] < largest.bar())) largest.add(values[i], uint32_t(values[k + i]));
      }
      largest.write(out + row * 2 * k, out + row * 2 * k + k);
    }
  });
}

}  // namespace mpillama
