// The kernels of one level, as a table of functions. Each multiplies one panel (16 rows of a matrix) by a block of tokens.
//
// A block holds 1, 2, 4, 8 or 16 tokens, group of 32 columns by group, so that a kernel finds all of them at fixed
// distances from one pointer. For n tokens, a group is
//   quantized types:      int8 q[n][32], float d[n], int32 sum[n], float dsum[n], int32 sums[n][2], float dsums[n][2]
//   floating-point types: float x[n][32]
// where x = d q; sum is minus the sum of q, and dsum d times the sum of q; sums and dsums are the same for each 16 columns.
// Some levels keep q of two tokens together: `place_token` in kernels_impl.h.
#pragma once
#include <cstddef>
#include <cstdint>

#include "formats.h"
#include "level.h"
#if MPILLAMA_AMX
#include "tile_config.h"
#endif

namespace mpillama {

constexpr int max_tokens = 16;

constexpr size_t int_group_bytes(size_t n) { return n * (32 + 3 * 4 + 2 * 8); }
constexpr size_t float_group_bytes(size_t n) { return n * 128; }

// Where these are in a group of quantized types, in bytes; q comes first.
struct IntGroup {
  size_t d, sum, dsum, sums, dsums;
};
constexpr IntGroup int_group(size_t n) { return {32 * n, 36 * n, 40 * n, 44 * n, 52 * n}; }

// y[i][0 .. n_rows) = the product for token i; n_rows <= 16. codebook: of the types that have one.
using PanelFn = void (*)(const uint16_t* codebook, const uint8_t* panel, size_t n_units, const uint8_t* block,
                         float* const* y, int n_rows);

// Writes the first n weights of row `row` of a panel.
using RowFn = void (*)(const uint16_t* codebook, const uint8_t* panel, int row, size_t n, float* out);

// Writes token `i` of a block of `n`: n_groups groups of 32 values of x.
using PrepareFn = void (*)(const float* x, size_t n_groups, int n, int i, uint8_t* block);

struct Kernels {
  PrepareFn quantize, quantize_permuted, copy;
  PanelFn panel[64][5];  // by type and log2 of the number of tokens; null where there is none
  RowFn row[64];         // by type
};

const Kernels& kernels_of(Level level);

extern const Kernels scalar_kernels;
#if MPILLAMA_X86
extern const Kernels avx2_kernels, avx512_kernels;
#elif MPILLAMA_ARM
extern const Kernels neon_kernels, dotprod_kernels, i8mm_kernels, sve512_kernels;
#endif

#if MPILLAMA_AMX
using ExpandFn = void (*)(const uint8_t* panel, size_t first, size_t last, uint16_t* tiles);

// Panels that are expanded bit by bit while tiles of others are multiplied, which leaves the units for vectors time.
class Expansion {
 public:
  static constexpr size_t most_panels = 16;
  size_t pace = 1;  // groups of a step

  void add(ExpandFn fn, const uint8_t* panel, size_t first, size_t last, uint16_t* tiles) {
    parts_[n_parts_++] = {fn, panel, first, last, tiles};
  }
  void step() { advance(pace); }
  // The rest. Then others can be added.
  void finish() {
    while (at_ < n_parts_) advance(size_t(-1));
    at_ = n_parts_ = 0;
  }

 private:
  struct Part {
    ExpandFn fn;
    const uint8_t* panel;
    size_t first, last;
    uint16_t* tiles;
  };

  void advance(size_t n) {
    if (at_ == n_parts_) return;
    Part& part = parts_[at_];
    const size_t count = n < part.last - part.first ? n : part.last - part.first;
    part.fn(part.panel, part.first, part.first + count, part.tiles);
    part.first += count, part.tiles += count * tile_values;
    at_ += part.first == part.last;
  }

  Part parts_[most_panels];
  size_t n_parts_ = 0, at_ = 0;
};

// Tokens as tiles of 16 x 32 in bf16: [n / 16][n_groups]; n_tokens need not be a multiple of 16, the rest becomes zero.
struct AmxKernels {
  // x: n_groups groups of 32 values of one token; row: of the token in the tile.
  void (*tile_row)(const float* x, size_t n_groups, int row, uint16_t* tiles);

  // Groups [first, last) of a panel as bf16 tiles of 16 x 16 pairs, by type.
  ExpandFn expand[64];

  // c (32 x 32, rows `stride` floats apart) = or += two rows of tiles times two panels, over n_groups tiles each; between
  // the two rows of token tiles lie a_step tiles. Meanwhile something is expanded.
  void (*multiply)(const uint16_t* a, size_t a_step, const uint16_t* b0, const uint16_t* b1, size_t n_groups, float* c,
                   size_t stride, bool add, Expansion& meanwhile);
  // Sets this thread's tiles up; `before` is for `end`.
  void (*begin)(TileConfig* before);
  void (*end)(const TileConfig* before);
};
extern const AmxKernels amx_kernels;
#endif

}  // namespace mpillama
