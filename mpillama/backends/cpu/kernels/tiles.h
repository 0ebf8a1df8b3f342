// Products on the tiles of AMX.
#pragma once
#include "kernels.h"
#include "plan.h"

#if MPILLAMA_AMX

namespace mpillama {

// Whether AMX is the faster way for so many tokens of one matrix.
bool wants_tiles(const Pool& pool, const PackedWeight& w, size_t n_tokens);

// Matrices with rows of the same length, times the same tokens: the segments of a plan for which `wants_tiles`.
class TileProduct {
 public:
  // Makes tiles of the tokens.
  TileProduct(Pool& pool, std::vector<Product> products, const Input& x, const Plan& plan, const std::vector<Segment>& segments);

  void run();

  // For two products of the same shape: y = act(the first) * the second; their own y are not used.
  using GatedFn = void (*)(Activation, const float*, const float*, float*, size_t);
  void run_gated(GatedFn gated, Activation activation, float* y);

 private:
  // Tokens [begin, end) of a segment; `row` is where they begin among the tiles.
  struct Slice {
    const Segment* segment;
    size_t begin, end, row;
  };

  // Groups [g0, g0 + n_groups) of the columns of panels [p0, p0 + n_panels) of one product, or of several, times a slice.
  struct Piece {
    size_t number;  // among those of a task, which follow each other
    const Slice* slice;
    const Product* products;
    size_t p0, n_panels, g0, n_groups;
  };

  // Calls put(product, c, to_next, row, column, n) for pieces of rows of y: n values at c, and `to_next` values after them those
  // of the next of n_together products.
  template <class Put> void run_tasks(size_t n_together, const Put& put);

  Pool& pool_;
  const std::vector<Product> products_;
  const size_t n_groups_;
  const Plan& plan_;
  std::vector<Slice> slices_;
  uint16_t* tokens_;
};

}  // namespace mpillama

#endif
