// The ops that look at each element, row or head by itself. Shapes as in base.py; arrays are contiguous float32.
#pragma once
#include <cstddef>
#include <cstdint>

#include "level.h"

namespace mpillama {

enum class Activation { silu, gelu, swiglu_oai };

// Of one level; n elements unless told otherwise. Results may overwrite the first input.
struct ElementwiseKernels {
  void (*gated)(Activation, const float* gate, const float* up, float* out, size_t n);
  void (*sigmoid)(const float* x, float* out, size_t n);
  void (*softcap)(const float* x, float cap, float* out, size_t n);
  void (*add)(const float* a, const float* b, float* out, size_t n);
  void (*mul)(const float* a, const float* b, float* out, size_t n);
  void (*scale)(const float* a, float factor, float* out, size_t n);
  // out += factor * x
  void (*accumulate)(const float* x, float factor, float* out, size_t n);
  // One row of n.
  void (*rms_norm)(const float* x, const float* w, float eps, float* out, size_t n);
  // One head of n, of which n_rot are rotated: element i times cos[i], plus its partner times sin[i], which has the sign.
  // Partners are n_rot / 2 apart (neox), or next to each other.
  void (*rope)(const float* x, const float* cos, const float* sin, size_t n_rot, bool neox, float* out, size_t n);
  // The place of the first element that is above a bar, or no number; n if there is none.
  size_t (*first_above)(const float* x, size_t n, float bar);
};

const ElementwiseKernels& elementwise_kernels_of(Level level);

extern const ElementwiseKernels scalar_elementwise;
#if MPILLAMA_X86
extern const ElementwiseKernels avx2_elementwise, avx512_elementwise;
#elif MPILLAMA_ARM
extern const ElementwiseKernels neon_elementwise, sve512_elementwise;
#endif

}  // namespace mpillama
