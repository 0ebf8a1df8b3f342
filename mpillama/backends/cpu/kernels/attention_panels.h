// Attention of many queries. To be included after a Simd.
//
// Queries, scores and sums lie in panels with the rows last, so that a lane belongs to one row from the first product to the
// last: nothing is summed or compared across lanes, and keys and values are broadcast. Tiles of the cache become floats once
// for all panels of an item.
#pragma once
#include "attention.h"
#include "attention_tiles.h"
#include "elementwise_math.h"

namespace mpillama {
namespace {

constexpr size_t lanes = Simd::panel_vectors * Simd::width;  // rows of a panel
static_assert(panel_rows % lanes == 0, "panels fill the memory of attention_floats");
// Scores of tokens that a row does not see, and the largest score of a row that has seen none: the weight of one relative to
// the other is 0, not undefined.
constexpr float unseen = -2e30f, none_seen = -1e30f;
// How far scores can be above the one that stands for the largest before sums are divided anew: weights are below e^8.
constexpr float tolerance = 8;

// c[n_columns][lanes] = or += the sum over k < depth of a[k][n_columns] times b[k][lanes]; the rows of a are lda floats apart.
template <int n_columns, int n_vectors, bool add>
inline void outer_block(const float* a, size_t lda, const float* b, float* c, size_t depth) {
  constexpr int width = Simd::width;
  F sum[n_columns][n_vectors];
  for (int i = 0; i < n_columns; i++)
    for (int v = 0; v < n_vectors; v++) sum[i][v] = add ? Simd::load(c + size_t(i) * lanes + v * width) : Simd::zero();
  for (size_t k = 0; k < depth; k++, a += lda, b += lanes) {
    F value[n_vectors];
    for (int v = 0; v < n_vectors; v++) value[v] = Simd::load(b + v * width);
    for (int i = 0; i < n_columns; i++) {
      const F factor = Simd::all(a[i]);
      for (int v = 0; v < n_vectors; v++) sum[i][v] = Simd::fma(factor, value[v], sum[i][v]);
    }
  }
  for (int i = 0; i < n_columns; i++)
    for (int v = 0; v < n_vectors; v++) Simd::store(c + size_t(i) * lanes + v * width, sum[i][v]);
}

// The same for any number of columns.
template <int n_vectors, bool add>
void outer(const float* a, size_t lda, size_t n_columns, const float* b, float* c, size_t depth, Ahead& ahead) {
  constexpr size_t step = Simd::panel_columns;
  size_t i = 0;
  for (; i + step <= n_columns; i += step) {
    ahead.fetch();
    outer_block<int(step), n_vectors, add>(a + i, lda, b, c + i * lanes, depth);
  }
  for (; i < n_columns; i++) outer_block<1, n_vectors, add>(a + i, lda, b, c + i * lanes, depth);
}

// What a panel keeps from span to span; each of it has the rows last.
struct Panel {
  const float* q;        // [n_k][lanes], times scale
  const float* offset;   // [lanes], of a row's token from the first of the item
  float *m, *l, *o;      // [lanes], [lanes], [n_v][lanes]: about the largest score, sum of weights, weighted sums of values
  int64_t first, last;   // offsets of its first and last token
};

// n tokens, a multiple of kv_block, as floats; the tokens that somebody of the item sees are [from, to), and values of others
// may be anything. `start` is the position of the first, from that of the item.
struct Span {
  const float *keys, *values;  // [tiles][n_k][kv_block], [n][stride]
  int64_t start, n, from, to;
};

// Lanes that do not see a token get a score that says so.
template <int n_vectors> void hide(const AttentionStep& s, const Span& span, const Panel& p, int64_t begin, int64_t end, float* scores) {
  const F window = Simd::all(float(s.window));
  for (int v = 0; v < n_vectors; v++) {
    const F own = Simd::load(p.offset + v * Simd::width);
    for (int64_t i = begin; i < end; i++) {
      float* score = scores + size_t(i) * lanes + v * Simd::width;
      const F token = Simd::all(float(span.start + i)), none = Simd::all(unseen);
      F x = Simd::if_less(own, token, none, Simd::load(score));
      if (s.window) x = Simd::if_less(token, Simd::add(Simd::sub(own, window), Simd::all(1)), none, x);
      Simd::store(score, x);
    }
  }
}

// Scores of n tokens, a multiple of 4, become weights; m, l and o follow scores far above the largest. Only tokens that are not seen
// need to have no weight at all.
template <int n_vectors, bool some_unseen> void weigh_panel(float* scores, size_t n, const Panel& p, size_t n_v) {
  constexpr size_t width = Simd::width;
  F m[n_vectors], top[n_vectors], l[n_vectors];
  for (int v = 0; v < n_vectors; v++) top[v] = m[v] = Simd::load(p.m + v * width);
  for (size_t i = 0; i < n; i += 4)
    for (int v = 0; v < n_vectors; v++) {
      const float* x = scores + i * lanes + v * width;
      const F a = Simd::max(Simd::load(x), Simd::load(x + lanes)), b = Simd::max(Simd::load(x + 2 * lanes), Simd::load(x + 3 * lanes));
      // What is not a number comes first, and is left to the weights.
      top[v] = Simd::max(Simd::max(a, b), top[v]);
    }
  bool grown = false;
  for (int v = 0; v < n_vectors; v++) {
    // Of a row that is not finite the difference is no number, which must not hide that others have grown.
    grown = grown || !Simd::at_most(Simd::sub(top[v], m[v]), Simd::all(tolerance));
    l[v] = Simd::load(p.l + v * width);
  }
  if (grown) {
    F factor[n_vectors];
    for (int v = 0; v < n_vectors; v++) {
      factor[v] = exp_near_0<true>(Simd::sub(m[v], top[v]));
      l[v] = Simd::mul(factor[v], l[v]);
      m[v] = top[v];
      Simd::store(p.m + v * width, m[v]);
    }
    for (size_t i = 0; i < n_v * lanes; i += lanes)
      for (int v = 0; v < n_vectors; v++) Simd::store(p.o + i + v * width, Simd::mul(factor[v], Simd::load(p.o + i + v * width)));
  }
  for (size_t i = 0; i < n * lanes; i += lanes)
    for (int v = 0; v < n_vectors; v++) {
      const F weight = exp_near_0<some_unseen>(Simd::sub(Simd::load(scores + i + v * width), m[v]));
      Simd::store(scores + i + v * width, weight);
      l[v] = Simd::add(l[v], weight);
    }
  for (int v = 0; v < n_vectors; v++) Simd::store(p.l + v * width, l[v]);
}

// A span joins the sums of a panel; scores: [panel_span][lanes].
template <int n_vectors> void attend_span(const AttentionStep& s, const Span& span, const Panel& p, float* scores, Ahead& ahead) {
  constexpr int64_t unit = 8;  // tokens: of those that nobody sees few are computed
  const int64_t oldest = s.window ? p.first - s.window + 1 - span.start : 0, newest = p.last + 1 - span.start;
  const int64_t begin = oldest > 0 ? oldest / unit * unit : 0;
  const int64_t end = newest < span.n ? (newest + unit - 1) / unit * unit : span.n;
  if (begin >= end) return;
  const size_t n_k = s.k.n_dim, n_v = s.v.n_dim, n = size_t(end - begin);
  for (int64_t i = begin, next; i < end; i = next) {
    const int64_t tile = i / int64_t(kv_block) * int64_t(kv_block);
    next = end < tile + int64_t(kv_block) ? end : tile + int64_t(kv_block);
    const float* keys = span.keys + size_t(tile) * n_k + (i - tile);
    outer<n_vectors, false>(keys, kv_block, size_t(next - i), p.q, scores + size_t(i) * lanes, n_k, ahead);
  }
  float* first = scores + size_t(begin) * lanes;
  if (s.softcap != 0) {
    const F cap = Simd::all(s.softcap);
    for (size_t i = 0; i < n * lanes; i += Simd::width) Simd::store(first + i, Simd::mul(cap, tanh(Simd::load(first + i))));
  }
  const bool all_see_all = p.first >= span.start + end - 1 && (!s.window || p.last - s.window < span.start + begin);
  if (!all_see_all) hide<n_vectors>(s, span, p, begin, end, scores);
  (all_see_all ? weigh_panel<n_vectors, false> : weigh_panel<n_vectors, true>)(first, n, p, n_v);
  const int64_t from = begin > span.from ? begin : span.from, to = end < span.to ? end : span.to;
  if (from >= to) return;
  const size_t stride = sums_stride(n_v);
  outer<n_vectors, true>(span.values + size_t(from) * stride, stride, n_v, scores + size_t(from) * lanes, p.o, size_t(to - from),
                         ahead);
}

using AttendSpan = void (*)(const AttentionStep&, const Span&, const Panel&, float*, Ahead&);
template <int... i> constexpr AttendSpan attend_span_of(int n_vectors, std::integer_sequence<int, i...>) {
  constexpr AttendSpan by_vectors[] = {attend_span<i + 1>...};
  return by_vectors[n_vectors - 1];
}

void attend_panels(const AttentionStep& s, const AttentionItem& item, float* memory) {
  const size_t n_k = s.k.n_dim, n_v = s.v.n_dim, stride = sums_stride(n_v), n_rows = item.n_tokens * item.n_heads;
  const size_t n_panels = (n_rows + lanes - 1) / lanes, n_padded = n_panels * lanes;
  float* scores = memory;                          // [panel_span][lanes]
  float* keys = scores + panel_span * lanes;       // [panel_span / kv_block][n_k][kv_block]
  float* values = keys + panel_span * n_k;         // [panel_span][stride]
  float* m = values + panel_span * stride;         // [n_padded]
  float* l = m + n_padded;                         // [n_padded]
  float* offset = l + n_padded;                    // [n_padded]
  float* q = offset + n_padded;                    // [n_panels][n_k][lanes]
  float* o = q + n_padded * n_k;                   // [n_panels][n_v][lanes]

  const float scale = s.softcap != 0 ? s.scale / s.softcap : s.scale;
  for (size_t r = 0; r < n_padded; r++) {
    const size_t row = r < n_rows ? r : n_rows - 1, token = row / item.n_heads;  // the last one fills the panel
    const float* from = s.q + ((item.token + token) * s.n_head + size_t(item.heads[row % item.n_heads])) * n_k;
    float* to = q + r / lanes * lanes * n_k + r % lanes;
    for (size_t i = 0; i < n_k; i++) to[i * lanes] = from[i] * scale;
    m[r] = none_seen;
    offset[r] = float(token);
  }
  std::memset(l, 0, n_padded * sizeof(float));
  std::memset(o, 0, n_padded * n_v * sizeof(float));

  const auto tile_of = [&](const Tiles& t, size_t block) { return t.tile(size_t(item.table[block]), item.kv_head); };
  constexpr size_t span_blocks = panel_span / kv_block;
  const size_t n_pieces = n_panels * (panel_span + n_v) / Simd::panel_columns;
  const size_t bytes = span_blocks * (tile_bytes(s.k.type, n_k) + tile_bytes(s.v.type, n_v));
  const size_t ahead_piece = round_up(bytes / n_pieces + 1, 64);
  for (size_t begin = item.first_block; begin < item.last_block; begin += span_blocks) {
    const size_t end = begin + span_blocks < item.last_block ? begin + span_blocks : item.last_block;
    const int64_t start = int64_t(begin * kv_block) - item.position, n = int64_t((end - begin) * kv_block);
    const int64_t oldest = s.window ? 1 - s.window - start : 0, newest = int64_t(item.n_tokens) - start;
    const Span span{keys, values, start, n, oldest > 0 ? oldest : 0, newest < n ? newest : n};
    for (size_t block = begin; block < end; block++) {
      const size_t at = (block - begin) * kv_block;
      expand_keys(s.k, tile_of(s.k, block), keys + at * n_k);
      expand_values(s.v, tile_of(s.v, block), values + at * stride, stride);
    }
    Ahead ahead{};
    for (size_t block = end; block < end + span_blocks && block < item.last_block; block++) {
      ahead.tiles[ahead.n_tiles++] = {tile_of(s.k, block), tile_bytes(s.k.type, n_k)};
      ahead.tiles[ahead.n_tiles++] = {tile_of(s.v, block), tile_bytes(s.v.type, n_v)};
    }
    ahead.piece = ahead_piece;
    for (size_t i = 0; i < n_panels; i++) {
      const size_t row = i * lanes, last = (i + 1 < n_panels ? row + lanes : n_rows) - 1;
      const Panel panel{q + row * n_k, offset + row, m + row, l + row, o + row * n_v,
                        int64_t(row / item.n_heads), int64_t(last / item.n_heads)};
      const int n_vectors = int((last - row) / Simd::width + 1);
      attend_span_of(n_vectors, std::make_integer_sequence<int, Simd::panel_vectors>())(s, span, panel, scores, ahead);
    }
  }

  float* most = item.partial;
  float* total = most + round_up(n_rows, 16);
  float* sums = most + 2 * round_up(n_rows, 16);
  for (size_t r = 0; r < n_rows; r++) {
    most[r] = m[r];
    total[r] = l[r];
    const float* from = o + r / lanes * lanes * n_v + r % lanes;
    for (size_t i = 0; i < n_v; i++) sums[r * stride + i] = from[i * lanes];
  }
}

}  // namespace
}  // namespace mpillama
