// Python's view of `packed.h` and `matmul.h`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>
#include <vector>

#include "calls.h"
#include "matmul.h"
#include "stream.h"

namespace nb = nanobind;
using namespace mpillama;

namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using Tokens = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;
using Words = nb::ndarray<const uint16_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Raw = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

Input input_of(const ConstFloats& x, const PackedWeight& w, size_t pad) {
  check(x.ndim() >= 1, "x has no axes");
  size_t rows = 1;
  for (size_t i = 0; i + 1 < x.ndim(); i++) rows *= x.shape(i);
  const size_t width = x.shape(x.ndim() - 1);
  check(width + pad <= w.n_in, "x is wider than the matrix");
  return {x.data(), rows, width, pad};
}

void make_weight(PackedWeight* self, int type, size_t n_mats, size_t n_rows, size_t n_in, const Words& codebook) {
  check(is_packed(type), "this type cannot be packed");
  const Format f = format_of(type);
  check(n_in % size_t(f.block) == 0, "rows are not whole blocks");
  check(codebook.size() == size_t(f.n_vectors), "this is not the codebook of the type");
  new (self) PackedWeight(type, n_mats, n_rows, n_in, codebook.data());
}

void pack(Pool& pool, PackedWeight& w, size_t first, const Raw& rows) {
  check(rows.shape(1) == file_row_bytes(w.format, w.n_in), "rows have the wrong size");
  check(w.are_panels(first, rows.shape(0)), "rows are not whole panels of the weight");
  const Released released;
  w.pack(pool, first, rows.data(), rows.shape(0));
}

void bind_linear(Pool& pool, const PackedWeight& w, const ConstFloats& x, size_t pad, const Floats& out) {
  const Input input = input_of(x, w, pad);
  check(w.n_mats > 0, "there is no matrix");
  check(out.size() == input.n_rows * w.n_rows, "out has the wrong size");
  const Released released;
  linear(pool, w, input, out.data());
}

void bind_linears(Pool& pool, const std::vector<const PackedWeight*>& ws, const ConstFloats& x, size_t pad,
                  const std::vector<Floats>& outs) {
  check(!ws.empty() && ws.size() == outs.size(), "there is not one out for each matrix");
  const Input input = input_of(x, *ws[0], pad);
  std::vector<Product> products;
  for (size_t i = 0; i < ws.size(); i++) {
    check(ws[i]->n_mats > 0 && ws[i]->n_in == ws[0]->n_in, "the matrices have rows of different sizes");
    check(outs[i].size() == input.n_rows * ws[i]->n_rows, "out has the wrong size");
    products.push_back({ws[i], outs[i].data()});
  }
  const Released released;
  linears(pool, products, input);
}

void bind_gated_linear(Pool& pool, int activation, const PackedWeight& gate, const PackedWeight& up, const ConstFloats& x,
                       size_t pad, const Floats& out) {
  const Input input = input_of(x, gate, pad);
  check(activation >= 0 && activation <= int(Activation::swiglu_oai), "there is no such activation");
  check(gate.n_mats > 0 && up.n_mats > 0, "there is no matrix");
  check(gate.n_in == up.n_in && gate.n_rows == up.n_rows, "the matrices have different shapes");
  check(out.size() == input.n_rows * gate.n_rows, "out has the wrong size");
  const Released released;
  gated_linear(pool, Activation(activation), gate, up, input, out.data());
}

void bind_expert_linear(Pool& pool, const PackedWeight& w, const ConstFloats& x, size_t pad, const Indices& experts,
                        const Floats& out) {
  const Input input = input_of(x, w, pad);
  check(experts.ndim() == 2, "experts has not two axes");
  const size_t n_tokens = experts.shape(0), n_used = experts.shape(1);
  check(input.n_rows == n_tokens || input.n_rows == n_tokens * n_used, "x has the wrong number of rows");
  check(out.size() == n_tokens * n_used * w.n_rows, "out has the wrong size");
  const Released released;
  expert_linear(pool, w, input, n_tokens, n_used, experts.data(), out.data());
}

void bind_embedding(Pool& pool, const PackedWeight& w, const Tokens& tokens, int64_t first, const Floats& out) {
  check(w.n_mats > 0, "there is no matrix");
  check(out.size() == tokens.size() * w.n_in, "out has the wrong size");
  const Released released;
  embedding(pool, w, tokens.data(), first, tokens.size(), out.data());
}

}  // namespace

void bind_matmul(nb::module_& m, nb::class_<Calls>& calls);
void bind_matmul(nb::module_& m, nb::class_<Calls>& calls) {
  nb::class_<PackedWeight>(m, "PackedWeight", "A stack of matrices, laid out for the kernels.")
      .def("__init__", make_weight, nb::arg("type"), nb::arg("n_mats"), nb::arg("n_rows"), nb::arg("n_in"),
           nb::arg("codebook"),
           "Reserve memory for `pack`. codebook: uint16, empty for types without one.\n\n"
           "Raises:\n    ValueError: the type cannot be packed, or rows or the codebook do not fit it.")
      .def_ro("n_mats", &PackedWeight::n_mats)
      .def_ro("n_rows", &PackedWeight::n_rows)
      .def_ro("n_in", &PackedWeight::n_in)
      .def_prop_ro("nbytes", &PackedWeight::bytes);
  m.def(
      "packed_types",
      [] {
        std::vector<int> types;
        for (int type = 0; type < 64; type++)
          if (is_packed(type)) types.push_back(type);
        return types;
      },
      "Numbers of the tensor types that `pack` takes.");
  m.def("pack", pack, nb::arg("pool"), nb::arg("w"), nb::arg("first"), nb::arg("rows"),
        "Pack rows, uint8 (n, row bytes), of which the first has the number `first`, counted through all matrices; nothing "
        "of the arguments is kept.\n\nRaises:\n    ValueError: they are not whole panels of 16 rows, or of the last of a "
        "matrix.");
  bind_kernel(m, calls, "linear", bind_linear, nb::arg("pool"), nb::arg("w"), nb::arg("x"), nb::arg("pad"),
              nb::arg("out").noconvert(),
              "out (T, n_rows) = x (T, width) times the first matrix; x meets its columns [pad, pad + width).");
  bind_kernel(m, calls, "linears", bind_linears, nb::arg("pool"), nb::arg("ws"), nb::arg("x"), nb::arg("pad"),
              nb::arg("outs"), "linear with each of several matrices whose rows have the same size; outs are filled.");
  bind_kernel(m, calls, "gated_linear", bind_gated_linear, nb::arg("pool"), nb::arg("activation"), nb::arg("gate"),
              nb::arg("up"), nb::arg("x"), nb::arg("pad"), nb::arg("out").noconvert(),
              "out (T, n_rows) = act(x times gate) * (x times up); activations as in `gated`.");
  bind_kernel(m, calls, "expert_linear", bind_expert_linear, nb::arg("pool"), nb::arg("w"), nb::arg("x"), nb::arg("pad"),
              nb::arg("experts"), nb::arg("out").noconvert(),
              "out (T, K, n_rows) = x (T, width) or (T, K, width) times matrices experts (T, K), int64.");
  bind_kernel(m, calls, "embedding", bind_embedding, nb::arg("pool"), nb::arg("w"), nb::arg("tokens"),
              nb::arg("first"), nb::arg("out").noconvert(),
              "out (T, n_in) = rows tokens - first, int32 (T,), of the first matrix; zeros where there is no such row.");
  m.def("stream_gbps", stream_gbps, nb::arg("pool"), nb::arg("n_bytes"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Measure how fast all threads together read n_bytes of memory, sequentially, in 1e9 bytes/s (the median of the "
        "rounds that fit into the time).");
}
