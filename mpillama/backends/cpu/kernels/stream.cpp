#include "stream.h"

#include <chrono>
#include <cstdint>

#include "packed.h"

namespace mpillama {

double stream_gbps(Pool& pool, size_t n_bytes, double seconds) {
  using clock = std::chrono::steady_clock;
  constexpr size_t piece = 1 << 20;
  const size_t n = std::max<size_t>(1, n_bytes / piece);
  Pages pages(n * piece);
  const auto lock = pool.lock();
  uint64_t* words = reinterpret_cast<uint64_t*>(pages.data());
  constexpr size_t per_piece = piece / sizeof(uint64_t);
  pool.parallel_for(n * per_piece, per_piece, [&](size_t begin, size_t end) {
    for (size_t i = begin; i < end; i++) words[i] = i;
  });
  std::atomic<uint64_t> total{0};
  std::vector<double> rates;
  const clock::time_point start = clock::now();
  do {
    const clock::time_point before = clock::now();
    pool.parallel_for(n * per_piece, per_piece, [&](size_t begin, size_t end) {
      uint64_t sums[8] = {};
      for (size_t i = begin; i < end; i += 8)
        for (size_t j = 0; j < 8; j++) sums[j] += words[i + j];
      uint64_t sum = 0;
      for (uint64_t s : sums) sum += s;
      total.fetch_add(sum, std::memory_order_relaxed);
    });
    rates.push_back(double(n * piece) / std::chrono::duration<double>(clock::now() - before).count() / 1e9);
  } while (std::chrono::duration<double>(clock::now() - start).count() < seconds);
  // Without a use of the sum the reads could be left out.
  if (total.load() == 1) rates.push_back(0);
  std::nth_element(rates.begin(), rates.begin() + long(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

}  // namespace mpillama
