// Before each kernel that hipRTC compiles: the emulator, and how large a kernel's arguments are.
#pragma once
#include "emulate.h"

namespace rocm {
template <class... A> int sizes(void (*)(A...), unsigned* out) {
  const unsigned found[] = {(unsigned)sizeof(A)..., 0};
  for (unsigned i = 0; i < sizeof...(A); i++) out[i] = found[i];
  return sizeof...(A);
}
}  // namespace rocm

#undef MPL_EXPORT
#define MPL_EXPORT(name)                                                                   \
  extern "C" const char* name##__launch(const unsigned* how, size_t shared, void** args) { \
    return emulate::launch(name, how, shared, args);                                       \
  }                                                                                        \
  extern "C" int name##__sizes(unsigned* out) { return rocm::sizes(name, out); }
