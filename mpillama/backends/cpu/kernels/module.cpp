// mpillama._cpu: the kernels of the CPU backend.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <vector>

#include "calls.h"
#include "pool.h"
#include "tile_trap.h"

namespace nb = nanobind;
using mpillama::Calls;
using mpillama::Pool;

void bind_matmul(nb::module_& m, nb::class_<Calls>& calls);
void bind_attention(nb::module_& m, nb::class_<Calls>& calls);

NB_MODULE(_cpu, m) {
  m.doc() = "Native kernels of the CPU backend.";
  // A process may end while threads of it still hold objects, of which users need not hear.
  nb::set_leak_warnings(false);
  m.def(
      "levels",
      [] {
        std::vector<std::string> names;
        for (mpillama::Level level : mpillama::available_levels()) names.push_back(mpillama::level_name(level));
        return names;
      },
      "Names of the instruction set levels that can be used here, in ascending order.");
  m.def("trap_tiles", mpillama::trap_tiles,
        "Compute AMX tiles by a signal handler from now on, slowly, where the machine has none: for tests. levels() then has "
        "amx, if the machine has avx512 and the compiler knew tiles.");
  nb::class_<Pool>(m, "Pool", "Threads for kernels; the calling thread is one of them.")
      .def("__init__",
           [](Pool* self, int n_threads, const std::vector<int>& cores, const std::string& level) {
             new (self) Pool(n_threads, cores, mpillama::choose_level(level));
           },
           nb::arg("n_threads"), nb::arg("cores") = std::vector<int>(), nb::arg("level") = "",
           "Start threads.\n\nArgs:\n    n_threads: the caller included.\n    cores: thread i is pinned to "
           "cores[i % len(cores)]; empty: nothing is pinned.\n    level: one of levels(); empty: the highest of the machine.\n\n"
           "Raises:\n    ValueError: the level is not available, or the number of threads absurd.")
      .def_prop_ro("n_threads", &Pool::size)
      .def_prop_ro("busy_ns", &Pool::busy_ns, "Nanoseconds spent in kernels so far, as their caller sees it.")
      .def_prop_ro("level", [](const Pool& pool) { return std::string(level_name(pool.level())); });
  nb::class_<Calls> calls(m, "Calls", "Calls of kernels: methods with the names of the kernels note one with its arguments, "
                          "which must stay.");
  calls.def(nb::init<>())
      .def("__len__", &Calls::size)
      .def("foreign", &Calls::foreign, nb::arg("capsule"), "Note a call of another extension module; see foreign.h.")
      .def("play", &Calls::play, "Make all calls, in their order.\n\nRaises:\n    Whatever one of them raises.");
  bind_matmul(m, calls);
  bind_attention(m, calls);
}
