#include "packed.h"

#include <algorithm>
#include <cstring>

#include "pack.h"

namespace mpillama {
namespace {

PackFn pack_fn(Level level, int type) {
#if MPILLAMA_X86
  // AVX512 makes it no faster.
  if (level >= Level::avx2) return avx2_pack(type);
#endif
  (void)level;
  return scalar_pack(type);
}

}  // namespace

PackedWeight::PackedWeight(int type_, size_t n_mats_, size_t n_rows_, size_t n_in_, const uint16_t* codebook)
    : type(type_),
      format(format_of(type_)),
      n_mats(n_mats_),
      n_rows(n_rows_),
      n_in(n_in_),
      n_panels((n_rows_ + 15) / 16),
      n_units(units(format, n_in_)),
      n_groups(n_units * size_t(format.unit / 32)),
      panel_bytes(mpillama::panel_bytes(format, n_in_)),
      pages_(n_mats_ * n_panels * panel_bytes),
      // Some kernels read a word past the last entry.
      codebook_(size_t(format.n_vectors + 2) * sizeof *codebook) {
  std::memcpy(codebook_.data(), codebook, size_t(format.n_vectors) * sizeof *codebook);
}

bool PackedWeight::are_panels(size_t first, size_t n) const {
  const auto between = [&](size_t row) { return row == n_mats * n_rows || row % n_rows % 16 == 0; };
  return n_rows ? first <= n_mats * n_rows && n <= n_mats * n_rows - first && between(first) && between(first + n) : !n;
}

void PackedWeight::pack(Pool& pool, size_t first, const uint8_t* rows, size_t n) {
  if (n == 0) return;
  const size_t row_bytes = file_row_bytes(format, n_in), last = first + n - 1;
  const size_t begin = first / n_rows * n_panels + first % n_rows / 16;
  const size_t end = last / n_rows * n_panels + last % n_rows / 16 + 1;
  const PackFn pack_panel = pack_fn(pool.level(), type);
  const auto lock = pool.lock();
  pool.parallel_for(end - begin, 4, [&](size_t from, size_t to) {
    for (size_t i = begin + from; i < begin + to; i++) {
      const size_t mat = i / n_panels, row = i % n_panels * 16;
      pack_panel(rows + (mat * n_rows + row - first) * row_bytes, std::min<size_t>(16, n_rows - row), n_in,
                 pages_.data() + i * panel_bytes);
    }
  });
}

}  // namespace mpillama
