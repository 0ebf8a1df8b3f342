// A call that one extension module makes for another; Python hands it over as a capsule of this name.
#pragma once

namespace mpillama {

constexpr const char* foreign_call_name = "mpillama.ForeignCall";

// run is called without the lock of the interpreter; it returns 0, or -1 with a Python exception set.
struct ForeignCall {
  int (*run)(void* self);
  void* self;
};

}  // namespace mpillama
