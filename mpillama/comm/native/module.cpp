// mpillama._shm: Python's view of `segment.h`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <chrono>
#include <stdexcept>
#include <utility>

#include "foreign.h"
#include "segment.h"

namespace nb = nanobind;
using namespace mpillama;

namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
template <class T>
using Numbers = nb::ndarray<T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

// Operations run without the lock of the interpreter; a watch takes it, and thereby lets signals in.
Watch watch_of(const nb::callable& f) {
  return [&f](const std::vector<int>& late, bool differs) {
    const nb::gil_scoped_acquire held;
    f(late, differs);
  };
}

template <class T>
void allreduce(Segment& segment, const Numbers<T>& x, size_t direct, const nb::callable& watch) {
  const Watch look = watch_of(watch);
  const nb::gil_scoped_release released;
  segment.allreduce(x.data(), x.size(), direct, look);
}

template <class T>
nb::object reduce(Segment& segment, const Numbers<T>& x, int n_carriers, const nb::callable& watch) {
  check(x.size() * sizeof(T) <= segment.capacity(), "x does not fit into a slot");
  check(n_carriers >= 1 && n_carriers <= segment.size(), "wrong number of carriers");
  const Watch look = watch_of(watch);
  T* share;
  {
    const nb::gil_scoped_release released;
    share = segment.reduce(x.data(), x.size(), n_carriers, look);
  }
  if (segment.rank() >= n_carriers) return nb::none();
  const size_t n = Segment::begin(x.size(), n_carriers, segment.rank() + 1) -
                   Segment::begin(x.size(), n_carriers, segment.rank());
  return nb::cast(nb::ndarray<nb::numpy, T, nb::ndim<1>>(share, {n}, nb::find(&segment)), nb::rv_policy::reference);
}

template <class T>
void spread(Segment& segment, const Numbers<T>& x, int n_carriers, const nb::callable& watch) {
  check(x.size() * sizeof(T) <= segment.capacity(), "x does not fit into a slot");
  check(n_carriers >= 1 && n_carriers <= segment.size(), "wrong number of carriers");
  const Watch look = watch_of(watch);
  const nb::gil_scoped_release released;
  segment.spread(x.data(), x.size(), n_carriers, look);
}

void allgather(Segment& segment, const ConstBytes& x, size_t n_rows, const std::vector<size_t>& widths,
               const Bytes& out, const nb::callable& watch) {
  check(widths.size() == size_t(segment.size()), "there must be a width for each rank");
  size_t row = 0;
  for (size_t width : widths) row += width;
  check(x.size() == n_rows * widths[segment.rank()], "x has the wrong size");
  check(out.size() == n_rows * row, "out has the wrong size");
  const Watch look = watch_of(watch);
  const nb::gil_scoped_release released;
  segment.allgather(x.data(), n_rows, widths, out.data(), look);
}

// An allreduce that native code makes again and again; it tells Python nothing but that somebody is late.
class AllreduceCall {
 public:
  using Place = nb::ndarray<uint64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
  using Counts = nb::ndarray<int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

  AllreduceCall(Segment& segment, Numbers<float> x, size_t direct, nb::callable watch, Place place, uint64_t kind, Counts counts)
      : segment_(segment), x_(std::move(x)), direct_(direct), watch_(std::move(watch)), place_(std::move(place)), kind_(kind),
        counts_(std::move(counts)) {
    check(place_.size() == 3 && counts_.size() == 3, "there are three numbers in a place, and three counts");
  }

  nb::capsule capsule() { return nb::capsule(&foreign_, foreign_call_name); }

 private:
  static int run(void* self) {
    try {
      static_cast<AllreduceCall*>(self)->run();
      return 0;
    } catch (nb::python_error& error) {
      const nb::gil_scoped_acquire held;
      error.restore();
    } catch (const std::exception& error) {
      const nb::gil_scoped_acquire held;
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return -1;
  }

  void run() {
    using Clock = std::chrono::steady_clock;
    const auto began = Clock::now();
    place_.data()[1] += 1;
    place_.data()[2] = kind_;
    bool first = true;
    const Watch look = [&](const std::vector<int>& late, bool differs) {
      const nb::gil_scoped_acquire held;
      watch_(late, differs, std::exchange(first, false));
    };
    segment_.allreduce(x_.data(), x_.size(), direct_, look);
    counts_.data()[0] += 1;
    counts_.data()[1] += int64_t(x_.size() * sizeof(float));
    counts_.data()[2] += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began).count();
  }

  Segment& segment_;
  const Numbers<float> x_;
  const size_t direct_;
  const nb::callable watch_;
  const Place place_;
  const uint64_t kind_;
  const Counts counts_;
  ForeignCall foreign_{run, this};
};

template <class T>
void bind_numbers(nb::class_<Segment>& c) {
  c.def("allreduce", &allreduce<T>, nb::arg("x").noconvert(), nb::arg("direct"), nb::arg("watch"));
  c.def("reduce", &reduce<T>, nb::arg("x").noconvert(), nb::arg("n_carriers"), nb::arg("watch"));
  c.def("spread", &spread<T>, nb::arg("x").noconvert(), nb::arg("n_carriers"), nb::arg("watch"));
}

}  // namespace

NB_MODULE(_shm, m) {
  m.doc() = "Collectives of the ranks of one host, through shared memory.";
  // A process may end while threads of it still hold objects, of which users need not hear.
  nb::set_leak_warnings(false);
  nb::class_<Segment> c(m, "Segment", "One rank's view of the memory that the ranks of a group on one host share.");
  c.def("__init__",
        [](Segment* self, const Bytes& memory, int rank, int size, size_t capacity, int spins) {
          check(size >= 1 && rank >= 0 && rank < size, "no such rank");
          check(capacity > 0 && capacity % kLine == 0, "capacity must be a multiple of 128");
          check(memory.size() >= Segment::bytes(size, capacity), "the memory is too small");
          check(reinterpret_cast<uintptr_t>(memory.data()) % kLine == 0, "the memory is not aligned");
          new (self) Segment(memory.data(), rank, size, capacity, spins);
        },
        nb::arg("memory"), nb::arg("rank"), nb::arg("size"), nb::arg("capacity"), nb::arg("spins"),
        nb::keep_alive<1, 2>());
  c.def_static("bytes", &Segment::bytes, nb::arg("size"), nb::arg("capacity"));
  c.def_prop_ro("capacity", &Segment::capacity);
  bind_numbers<float>(c);
  bind_numbers<double>(c);
  nb::class_<AllreduceCall>(m, "AllreduceCall", "An allreduce to be made again and again by native code.")
      .def("__init__",
           [](AllreduceCall* self, Segment& segment, const Numbers<float>& x, size_t direct, const nb::callable& watch,
              const AllreduceCall::Place& place, uint64_t kind, const AllreduceCall::Counts& counts) {
             new (self) AllreduceCall(segment, x, direct, watch, place, kind, counts);
           },
           nb::arg("segment"), nb::arg("x").noconvert(), nb::arg("direct"), nb::arg("watch"), nb::arg("place").noconvert(),
           nb::arg("kind"), nb::arg("counts").noconvert(), nb::keep_alive<1, 2>(),
           "x: replaced by its sum. watch: called with the late ranks, whether they differ, and whether it is the first time in\n"
           "this call. place: see Board.place; kind: what is noted there. counts: int64 (3,), to which a call adds 1, its bytes\n"
           "and its nanoseconds.")
      .def_prop_ro("capsule", &AllreduceCall::capsule, "See foreign.h; valid as long as this is.");
  c.def("allgather", &allgather, nb::arg("x"), nb::arg("n_rows"), nb::arg("widths"), nb::arg("out"), nb::arg("watch"));
}
