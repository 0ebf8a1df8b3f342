// Kernels that Python calls now, or notes with their arguments to have them all called again at once.
#pragma once
#include <nanobind/nanobind.h>

#include <functional>
#include <optional>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "foreign.h"

namespace mpillama {

// Lets other Python threads run while a kernel does; within `Calls::play` they run anyway.
class Released {
 public:
  Released() {
    if (!within()) released_.emplace();
  }
  static bool& within() {
    static thread_local bool value = false;
    return value;
  }

 private:
  std::optional<nanobind::gil_scoped_release> released_;
};

// Calls of kernels in their order. Python keeps what their arguments refer to.
class Calls {
 public:
  void add(std::function<void()> call) { calls_.push_back(std::move(call)); }
  size_t size() const { return calls_.size(); }

  // A call of another module; see `foreign.h`.
  void foreign(const nanobind::capsule& capsule) {
    const auto* call = static_cast<const ForeignCall*>(PyCapsule_GetPointer(capsule.ptr(), foreign_call_name));
    if (!call) throw nanobind::python_error();
    add([call] {
      if (call->run(call->self) == 0) return;
      const nanobind::gil_scoped_acquire held;
      throw nanobind::python_error();
    });
  }

  void play() const {
    const nanobind::gil_scoped_release released;
    struct Within {
      Within() { Released::within() = true; }
      ~Within() { Released::within() = false; }
    } const within;
    for (const auto& call : calls_) call();
  }

 private:
  std::vector<std::function<void()>> calls_;
};

// How an argument is kept: handles of arrays and numbers as they are, an object of Python's by its address.
template <class T, class Value = std::remove_cv_t<std::remove_reference_t<T>>>
using Kept = std::conditional_t<std::is_copy_constructible_v<Value>, Value, std::reference_wrapper<std::remove_reference_t<T>>>;

// Binds a kernel as a function of the module, to be called now, and as the method of Calls that notes a call.
template <class... Args, class... Extra>
void bind_kernel(nanobind::module_& m, nanobind::class_<Calls>& calls, const char* name, void (*kernel)(Args...),
                 const Extra&... extra) {
  m.def(name, kernel, extra...);
  calls.def(
      name,
      [kernel](Calls& self, Args... args) {
        self.add([kernel, kept = std::tuple<Kept<Args>...>(std::forward<Args>(args)...)] { std::apply(kernel, kept); });
      },
      extra...);
}

}  // namespace mpillama
