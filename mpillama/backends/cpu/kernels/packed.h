// A stack of matrices in packed form.
#pragma once
#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "pages.h"
#include "pool.h"

namespace mpillama {

class PackedWeight {
 public:
  // Without rows yet. codebook: the format's n_vectors words, which are copied; see `codec_codebook.h`.
  PackedWeight(int type, size_t n_mats, size_t n_rows, size_t n_in, const uint16_t* codebook);

  // Whether rows [first, first + n), counted through all matrices, are whole panels.
  bool are_panels(size_t first, size_t n) const;

  // Packs such rows: whole blocks, as the file has them.
  void pack(Pool& pool, size_t first, const uint8_t* rows, size_t n);

  const int type;
  const Format format;
  const size_t n_mats, n_rows, n_in;
  const size_t n_panels;     // of one matrix
  const size_t n_units, n_groups;  // of one panel; groups of 32 columns
  const size_t panel_bytes;

  const uint8_t* panel(size_t mat, size_t p) const { return pages_.data() + (mat * n_panels + p) * panel_bytes; }
  size_t bytes() const { return n_mats * n_panels * panel_bytes; }

  const uint16_t* codebook() const { return reinterpret_cast<const uint16_t*>(codebook_.data()); }

 private:
  Pages pages_, codebook_;
};

}  // namespace mpillama
