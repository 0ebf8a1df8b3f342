// Python's view of `attention_cache.h`, `elementwise_ops.h` and `top_k.h`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "attention_cache.h"
#include "calls.h"
#include "elementwise_ops.h"
#include "top_k.h"

namespace nb = nanobind;
using namespace mpillama;

namespace {

using Floats = nb::ndarray<float, nb::c_contig, nb::device::cpu>;
using ConstFloats = nb::ndarray<const float, nb::c_contig, nb::device::cpu>;
using Indices = nb::ndarray<int64_t, nb::c_contig, nb::device::cpu>;
using Doubles = nb::ndarray<const double, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ints = nb::ndarray<const int32_t, nb::c_contig, nb::device::cpu>;

void check(bool ok, const char* what) {
  if (!ok) throw std::invalid_argument(what);
}

void bind_attend(Pool& pool, const KVCache& cache, const ConstFloats& q, const ConstFloats& k, const ConstFloats& v,
                 const Ints& positions, const Ints& seq_lens, const Ints& tables, const std::vector<int32_t>& kv_heads,
                 double scale, double softcap, int64_t window, const std::optional<ConstFloats>& sinks,
                 const std::optional<ConstFloats>& cos, const std::optional<ConstFloats>& sin, bool neox, const Floats& out) {
  check(q.ndim() == 3 && k.ndim() == 3 && v.ndim() == 3 && tables.ndim() == 2, "wrong number of axes");
  const size_t n_tokens = q.shape(0), n_head = q.shape(1);
  const Tiles &tk = cache.k(), &tv = cache.v();
  check(q.shape(2) == tk.n_dim, "q has heads of another size than the cache");
  check(k.shape(0) == n_tokens && k.shape(1) == tk.n_heads && k.shape(2) == tk.n_dim, "k does not fit the cache");
  check(v.shape(0) == n_tokens && v.shape(1) == tv.n_heads && v.shape(2) == tv.n_dim, "v does not fit the cache");
  check(positions.size() == n_tokens && seq_lens.size() == tables.shape(0), "the batch does not fit together");
  check(kv_heads.size() == n_head && (!sinks || sinks->size() == n_head), "the heads do not fit together");
  check(out.size() == n_tokens * n_head * tv.n_dim && window >= 0, "out has the wrong size");
  const size_t n_rot = cos && cos->ndim() == 2 ? cos->shape(1) : 0;
  if (cos) {
    check(sin && sin->size() == n_tokens * n_rot && cos->size() == n_tokens * n_rot, "the rotations do not fit the batch");
    check(n_rot <= tk.n_dim && n_rot % 2 == 0, "the rotations do not fit the heads");
  }
  const AttentionCall call{q.data(), k.data(), v.data(), sinks ? sinks->data() : nullptr, out.data(), n_tokens, n_head,
                           positions.data(), seq_lens.data(), tables.data(), tables.shape(0), tables.shape(1),
                           kv_heads.data(), float(scale), float(softcap), window,
                           n_rot ? cos->data() : nullptr, n_rot ? sin->data() : nullptr, n_rot, neox};
  const Released released;
  attention(pool, cache, call);
}

// Tiles of a block lie next to each other, whatever the type.
void bind_copy_blocks(const KVCache& cache, const Ints& copies) {
  check(copies.ndim() == 2 && copies.shape(1) == 2, "copies are pairs of blocks");
  const auto in_range = [&](int32_t block) { return block >= 0 && size_t(block) < cache.n_blocks; };
  for (size_t i = 0; i < copies.size(); i++) check(in_range(copies.data()[i]), "there is no such block");
  const Released released;
  for (const Tiles& tiles : {cache.k(), cache.v()}) {
    const size_t bytes = tiles.n_heads * tile_bytes(tiles.type, tiles.n_dim);
    for (size_t i = 0; i < copies.shape(0); i++) {
      const int32_t source = copies.data()[2 * i], destination = copies.data()[2 * i + 1];
      if (source != destination && bytes) std::memcpy(tiles.tile(size_t(destination), 0), tiles.tile(size_t(source), 0), bytes);
    }
  }
}

const char* cache_type_name(CacheType type) {
  switch (type) {
    case CacheType::f32: return "f32";
    case CacheType::f16: return "f16";
    case CacheType::bf16: return "bf16";
    case CacheType::q8_0: return "q8_0";
    case CacheType::q4_0: return "q4_0";
  }
  return "";
}

nb::ndarray<nb::numpy, uint8_t, nb::ndim<3>> tiles_view(const KVCache& cache, const Tiles& tiles) {
  return {tiles.data, {cache.n_blocks, tiles.n_heads, tile_bytes(tiles.type, tiles.n_dim)}};
}

void bind_gated(Pool& pool, int activation, const ConstFloats& gate, const ConstFloats& up, const Floats& out) {
  check(activation >= 0 && activation <= int(Activation::swiglu_oai), "there is no such activation");
  check(gate.size() == up.size() && gate.size() == out.size(), "sizes differ");
  const Released released;
  gated(pool, Activation(activation), gate.data(), up.data(), out.data(), out.size());
}

void bind_sigmoid(Pool& pool, const ConstFloats& x, const Floats& out) {
  check(x.size() == out.size(), "sizes differ");
  const Released released;
  sigmoid(pool, x.data(), out.data(), x.size());
}

void bind_softcap(Pool& pool, const ConstFloats& x, double cap, const Floats& out) {
  check(x.size() == out.size(), "sizes differ");
  const Released released;
  softcap(pool, x.data(), float(cap), out.data(), x.size());
}

template <Binary op> void bind_binary(Pool& pool, const ConstFloats& a, const ConstFloats& b, const Floats& out) {
  check(a.size() == out.size() && (a.size() == 0 || (b.size() && a.size() % b.size() == 0)), "sizes do not fit together");
  const Released released;
  binary(pool, op, a.data(), b.data(), out.data(), a.size(), b.size());
}

void bind_scale(Pool& pool, const ConstFloats& a, double factor, const Floats& out) {
  check(a.size() == out.size(), "sizes differ");
  const Released released;
  scale(pool, a.data(), float(factor), out.data(), a.size());
}

void bind_rms_norm(Pool& pool, const ConstFloats& x, const ConstFloats& w, double eps, const Floats& out) {
  const size_t n = w.size();
  check(n && x.size() % n == 0 && x.size() == out.size(), "sizes do not fit together");
  const Released released;
  rms_norm(pool, x.data(), w.data(), float(eps), out.data(), x.size() / n, n);
}

void bind_rope(Pool& pool, const ConstFloats& x, const ConstFloats& cos, const ConstFloats& sin, bool neox,
               const Floats& out) {
  check(x.ndim() == 3 && cos.ndim() == 2 && sin.ndim() == 2, "wrong number of axes");
  const Rotation r{x.data(),   cos.data(), sin.data(),   out.data(), x.shape(0),
                   x.shape(1), x.shape(2), cos.shape(1), neox};
  check(cos.shape(0) == r.n_tokens && sin.shape(0) == r.n_tokens && sin.shape(1) == r.n_rot, "the table does not fit x");
  check(r.n_rot <= r.n && r.n_rot % 2 == 0 && out.size() == x.size(), "sizes do not fit together");
  const Released released;
  rope(pool, r);
}

void bind_rope_table(Pool& pool, const Ints& positions, const Doubles& theta, double factor, bool neox, const Floats& cos,
                     const Floats& sin) {
  const size_t n = positions.size() * theta.size() * 2;
  check(cos.size() == n && sin.size() == n, "the table has the wrong size");
  const Released released;
  rope_table(pool, {positions.data(), positions.size(), theta.data(), theta.size(), factor, neox, cos.data(), sin.data()});
}

void bind_sum_experts(Pool& pool, const ConstFloats& x, const ConstFloats& weights, const Floats& out) {
  check(x.ndim() == 3 && weights.ndim() == 2 && out.ndim() == 2, "wrong number of axes");
  check(weights.shape(0) == x.shape(0) && weights.shape(1) == x.shape(1), "the weights do not fit x");
  check(out.shape(0) == x.shape(0) && out.shape(1) == x.shape(2), "out has the wrong size");
  const Released released;
  sum_experts(pool, x.data(), weights.data(), out.data(), x.shape(0), x.shape(1), x.shape(2));
}

// k of each row, by the size of what it is written to.
size_t top_size(const ConstFloats& x, const Floats& out) {
  check(x.ndim() == 2 && out.ndim() == 2 && x.shape(0) == out.shape(0), "out has other rows than x");
  check(out.shape(1) > 0 && out.shape(1) % 2 == 0, "out has no pairs");
  return out.shape(1) / 2;
}

void bind_top_k(Pool& pool, const ConstFloats& x, uint32_t first, const Floats& out) {
  const size_t k = top_size(x, out);
  check(first + x.shape(1) <= size_t(1) << 24, "columns cannot be numbers");
  const Released released;
  top_k(pool, x.data(), x.shape(0), x.shape(1), k, first, out.data());
}

void bind_merge_top_k(Pool& pool, const ConstFloats& x, const Floats& out) {
  const size_t k = top_size(x, out);
  check(x.shape(1) % (2 * k) == 0, "x is not made of results of top_k");
  const Released released;
  merge_top_k(pool, x.data(), x.shape(0), x.shape(1) / (2 * k), k, out.data());
}

void bind_route(Pool& pool, const ConstFloats& logits, bool softmax_of_all, bool normalize, const Indices& experts,
                const Floats& weights) {
  check(logits.ndim() == 2 && experts.ndim() == 2 && weights.ndim() == 2, "wrong number of axes");
  const Routing r{logits.data(),   experts.data(),   weights.data(), logits.shape(0),
                  logits.shape(1), experts.shape(1), softmax_of_all, normalize};
  check(experts.shape(0) == r.n_tokens && weights.shape(0) == r.n_tokens, "sizes do not fit together");
  check(weights.shape(1) == r.n_used && r.n_used >= 1 && r.n_used <= r.n_expert, "too many experts are wanted");
  const Released released;
  route(pool, r);
}

}  // namespace

void bind_attention(nb::module_& m, nb::class_<Calls>& calls);
void bind_attention(nb::module_& m, nb::class_<Calls>& calls) {
  // Results are written to `out`, which must be just so; a copy made for the call would be lost.
  const nb::arg pool("pool"), x("x");
  const auto out = nb::arg("out").noconvert();
  nb::class_<KVCache>(m, "KVCache", "Keys and values of one block of the model, in blocks of 32 tokens.")
      .def("__init__",
           [](KVCache* self, size_t n_blocks, size_t n_head_kv, size_t n_k, size_t n_v, const std::string& type_k,
              const std::string& type_v) {
             new (self) KVCache(n_blocks, n_head_kv, n_k, n_v, cache_type(type_k), cache_type(type_v));
           },
           nb::arg("n_blocks"), nb::arg("n_head_kv"), nb::arg("n_k"), nb::arg("n_v"), nb::arg("type_k"), nb::arg("type_v"),
           "Reserve memory for types f32, f16, bf16, and, for heads of multiples of 32, q8_0 and q4_0.\n\n"
           "Raises:\n    ValueError: there is no such type, or the heads do not fit it.")
      .def_ro("n_blocks", &KVCache::n_blocks)
      .def_prop_ro("type_k", [](const KVCache& cache) { return cache_type_name(cache.k().type); })
      .def_prop_ro("type_v", [](const KVCache& cache) { return cache_type_name(cache.v().type); })
      .def_prop_ro("nbytes", &KVCache::bytes)
      .def_prop_ro("k", [](const KVCache& cache) { return tiles_view(cache, cache.k()); }, nb::rv_policy::reference_internal,
                   "The tiles of keys as they are stored, uint8 (n_blocks, n_head_kv, bytes); see attention_cache.h.")
      .def_prop_ro("v", [](const KVCache& cache) { return tiles_view(cache, cache.v()); }, nb::rv_policy::reference_internal,
                   "The tiles of values, likewise.");
  m.def("copy_blocks", bind_copy_blocks, nb::arg("cache"), nb::arg("copies"),
        "Copy blocks of keys and values, int32 (C, 2): source, destination; see Batch.copies.\n\n"
        "Raises:\n    ValueError: there is no such block.");
  bind_kernel(m, calls, "attention", bind_attend, pool, nb::arg("cache"), nb::arg("q"), nb::arg("k"), nb::arg("v"),
              nb::arg("positions"), nb::arg("seq_lens"), nb::arg("tables"), nb::arg("kv_heads"), nb::arg("scale"),
              nb::arg("softcap"), nb::arg("window"), nb::arg("sinks").none(), nb::arg("cos").none(), nb::arg("sin").none(),
              nb::arg("neox"), out,
              "Rotate q and k by cos and signed sin (T, n_rot) if these are given, store k and v, then attend; see "
              "Backend.attention.");
  bind_kernel(m, calls, "gated", bind_gated, pool, nb::arg("activation"), nb::arg("gate"), nb::arg("up"), out,
              "out = act(gate) * up; activation 0: silu, 1: gelu, 2: swiglu_oai.");
  bind_kernel(m, calls, "sigmoid", bind_sigmoid, pool, x, out, "out = 1 / (1 + exp(-x)).");
  bind_kernel(m, calls, "softcap", bind_softcap, pool, x, nb::arg("cap"), out, "out = cap * tanh(x / cap).");
  bind_kernel(m, calls, "add", bind_binary<Binary::add>, pool, nb::arg("a"), nb::arg("b"), out,
              "out = a + b, b repeated along the first axes.");
  bind_kernel(m, calls, "mul", bind_binary<Binary::mul>, pool, nb::arg("a"), nb::arg("b"), out,
              "out = a * b, b repeated along the first axes.");
  bind_kernel(m, calls, "scale", bind_scale, pool, nb::arg("a"), nb::arg("factor"), out, "out = factor * a.");
  bind_kernel(m, calls, "rms_norm", bind_rms_norm, pool, x, nb::arg("w"), nb::arg("eps"), out,
              "Each run of w.size elements over its rms, times w.");
  bind_kernel(m, calls, "rope", bind_rope, pool, x, nb::arg("cos"), nb::arg("sin"), nb::arg("neox"), out,
              "Rotate heads x (T, H, D) by cos and signed sin (T, n_rot).");
  bind_kernel(m, calls, "rope_table", bind_rope_table, pool, nb::arg("positions"), nb::arg("theta"), nb::arg("factor"),
              nb::arg("neox"), nb::arg("cos").noconvert(), nb::arg("sin").noconvert(),
              "Cosines and signed sines (T, 2 P), times factor, of positions (T,) times theta (P,), for `rope`.");
  bind_kernel(m, calls, "sum_experts", bind_sum_experts, pool, x, nb::arg("weights"), out,
              "out (T, N) = sum over K of weights (T, K) * x (T, K, N).");
  bind_kernel(m, calls, "top_k", bind_top_k, pool, x, nb::arg("first"), out,
              "out (L, 2 k) = the largest of each row of x (L, V) and their columns; see Backend.top_k.");
  bind_kernel(m, calls, "merge_top_k", bind_merge_top_k, pool, x, out,
              "out (L, 2 k) = the largest of x (L, P * 2 k), several results of top_k.");
  bind_kernel(m, calls, "route", bind_route, pool, nb::arg("logits"), nb::arg("softmax_of_all"), nb::arg("normalize"),
              nb::arg("experts").noconvert(), nb::arg("weights").noconvert(),
              "Choose experts: logits (T, E) to experts and weights (T, K).");
}
