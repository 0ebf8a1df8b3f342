"""The NumPy backend: the plain statement of every op, the oracle of all others, and good enough for small models.

Weights stay as the file has them and are dequantized a few rows at a time, except that small models are expanded to
float32 once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillama.backends.attention import KVCache, attend
from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch, RawWeight
from mpillama.backends.quants import SUPPORTED, dequantize
from mpillama.backends.rope import RopeTable, rope_table, rotate
from mpillama.config import Rope
from mpillama.gguf.types import GGMLType

EXPAND_BYTES = 64 << 20
"""All weights of a rank together are kept as float32 up to this size."""
_CHUNK_ELEMENTS = 4 << 20


@dataclass
class Matrix:
    """A stack of matrices, quantized or expanded; shape (n_mats, n_rows, n_in)."""

    raw: np.ndarray
    type: GGMLType
    n_in: int
    pad: tuple[int, int]
    floats: np.ndarray | None = None

    def chunks(self, mat: int) -> list[tuple[int, int]]:
        """Ranges of rows whose floats fit into a small temporary."""
        n_rows = self.raw.shape[1]
        if self.floats is not None:
            return [(0, n_rows)]
        step = max(1, _CHUNK_ELEMENTS // max(1, self.n_in))
        return [(i, min(n_rows, i + step)) for i in range(0, n_rows, step)]

    def rows(self, mat: int, start: int, stop: int) -> np.ndarray:
        """Return rows as float32 (stop - start, n_in)."""
        if self.floats is not None:
            return self.floats[mat, start:stop]
        return dequantize(self.raw[mat, start:stop], self.type)


class ReferenceBackend:
    """NumPy on the host."""

    name = "reference"
    host_arrays = True

    def __init__(self) -> None:
        self._expanded = 0

    def supports(self, type: GGMLType) -> bool:
        """Whether `dequantize` knows the type."""
        return type in SUPPORTED

    def weight(self, raw: RawWeight) -> Matrix:
        """Keep the slice, expanded while that is small."""
        matrix = Matrix(raw.raw, raw.type, raw.n_in, raw.pad)
        size = raw.raw.shape[0] * raw.raw.shape[1] * raw.n_in * 4
        if raw.type == GGMLType.F32 or self._expanded + size <= EXPAND_BYTES:
            matrix.floats = dequantize(raw.raw, raw.type)
            if raw.type != GGMLType.F32:
                self._expanded += size
        return matrix

    def vector(self, raw: RawWeight) -> np.ndarray:
        """Return float32 (rows, n)."""
        return dequantize(raw.raw[0], raw.type).copy()

    def asarray(self, x: np.ndarray) -> np.ndarray:
        """Return ``x``."""
        return x

    def to_host(self, x: np.ndarray) -> np.ndarray:
        """Return ``x``."""
        return np.asarray(x, np.float32)

    def embedding(self, tokens: np.ndarray, w: Matrix, first: int) -> np.ndarray:
        """Return rows of the embedding, zeros for those that are elsewhere."""
        index = tokens.astype(np.int64) - first
        here = (index >= 0) & (index < w.raw.shape[1])
        out = np.zeros((len(tokens), w.n_in), np.float32)
        if here.any():
            if w.floats is not None:
                out[here] = w.floats[0, index[here]]
            else:
                out[here] = dequantize(w.raw[0, index[here]], w.type)
        return out

    def _matmul(self, x: np.ndarray, w: Matrix, mat: int) -> np.ndarray:
        if any(w.pad):
            x = np.pad(x, ((0, 0), w.pad))
        out = np.empty((len(x), w.raw.shape[1]), np.float32)
        for start, stop in w.chunks(mat):
            np.matmul(x, w.rows(mat, start, stop).T, out=out[:, start:stop])
        return out

    def linear(self, x: np.ndarray, w: Matrix) -> np.ndarray:
        """Return x W^T."""
        return self._matmul(x, w, 0)

    def expert_linear(self, x: np.ndarray, w: Matrix, experts: np.ndarray) -> np.ndarray:
        """Multiply each token by the matrices of its experts, expert by expert."""
        n_tokens, n_used = experts.shape
        out = np.zeros((n_tokens, n_used, w.raw.shape[1]), np.float32)
        for expert in np.unique(experts[experts >= 0]):
            token, slot = np.nonzero(experts == expert)
            out[token, slot] = self._matmul(x[token] if x.ndim == 2 else x[token, slot], w, int(expert))
        return out

    def take(self, table: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return ``table[index]``."""
        return table[index]

    def add_taken(self, x: np.ndarray, table: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return x + table[index], and x where the index is negative."""
        return np.where((index < 0)[..., None], x, x + table[index])

    def rows(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Return these rows."""
        return x[index]

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return a + b."""
        return a + b

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        """Return a * b."""
        return a * (np.float32(b) if isinstance(b, float) else b)

    def sum_experts(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the weighted sum over the chosen experts."""
        return np.einsum("tkn,tk->tn", x, weights)

    def rms_norm(self, x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
        """Return the RMS norm."""
        mean_square = np.asarray(np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32))
        return self.scale_by_mean_square(x, mean_square, w, eps)

    def sum_squares(self, x: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return the sum of squares of a range."""
        part = x[..., start:stop]
        return np.asarray(np.sum(part * part, axis=-1, keepdims=True, dtype=np.float32))

    def scale_by_mean_square(self, x: np.ndarray, mean_square: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
        """Return x / sqrt(mean_square + eps) * w."""
        return x * (np.float32(1.0) / np.sqrt(mean_square + np.float32(eps))) * w

    def gated(self, activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Return act(gate) * up."""
        if activation == "silu":
            return gate * self.sigmoid(gate) * up
        if activation == "gelu":
            inner = np.float32(0.7978845608028654) * gate * (1 + np.float32(0.044715) * gate * gate)
            return np.float32(0.5) * gate * (1 + np.tanh(inner)) * up
        # gpt-oss: alpha 1.702, limit 7 (openai/gpt-oss, model card, section on the MoE block).
        gate, up = np.minimum(gate, np.float32(7.0)), np.clip(up, np.float32(-7.0), np.float32(7.0))
        return gate * self.sigmoid(np.float32(1.702) * gate) * (up + np.float32(1.0))

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        """Return 1 / (1 + exp(-x)) without overflow."""
        e = np.exp(-np.abs(x))
        return np.where(x >= 0, 1, e) / (1 + e)

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        """Return cap * tanh(x / cap)."""
        return np.float32(cap) * np.tanh(x / np.float32(cap))

    def route(self, logits: np.ndarray, n_used: int, gating: str, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
        """Choose the ``n_used`` likeliest experts of each token; among equals the first."""
        experts = np.argsort(-logits, axis=-1, kind="stable")[:, :n_used]
        if gating == "softmax":
            weights = np.take_along_axis(_softmax(logits), experts, axis=-1)
        else:
            weights = _softmax(np.take_along_axis(logits, experts, axis=-1))
        if normalize:
            weights = weights / np.maximum(weights.sum(axis=-1, keepdims=True), np.float32(6.103515625e-5))
        return experts, weights

    def held(self, index: np.ndarray, start: int, stop: int) -> np.ndarray:
        """Return index - start, or -1 outside of start to stop."""
        return np.where((index >= start) & (index < stop), index - start, -1)

    def as_numbers(self, index: np.ndarray) -> np.ndarray:
        """Return indices as float32."""
        return index.astype(np.float32)

    def as_index(self, x: np.ndarray) -> np.ndarray:
        """Return them as indices again."""
        return x.astype(np.int64)

    def top_k(self, x: np.ndarray, k: int, first: int) -> np.ndarray:
        """Return the largest of each row and their columns."""
        columns = np.broadcast_to(np.arange(first, first + x.shape[1]), x.shape)
        return _largest(x, columns.astype(np.float32), k)

    def merge_top_k(self, x: np.ndarray, k: int) -> np.ndarray:
        """Return the largest of several results of `top_k`."""
        parts = x.reshape(len(x), x.shape[1] // (2 * k), 2, k)
        values, columns = (parts[:, :, i].reshape(len(x), -1) for i in (0, 1))
        return _largest(values, columns, k)

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: np.ndarray | None) -> RopeTable:
        """Return cosines and sines of the step's tokens."""
        return rope_table(positions, rope, factors)

    def attn_temperature(self, positions: np.ndarray, span: float, scale: float) -> np.ndarray:
        """Return the factors on queries, (T, 1)."""
        factors = np.log(np.floor(positions / span) + 1.0) * scale + 1.0
        return np.asarray(factors[:, None], np.float32)

    def rope(self, x: np.ndarray, table: RopeTable) -> np.ndarray:
        """Rotate heads."""
        return rotate(x, table)

    def new_cache(self, n_blocks: int, n_head_kv: int, n_k: int, n_v: int, type_k: str, type_v: str) -> KVCache:
        """Allocate one block's KV cache."""
        return KVCache(n_blocks, n_head_kv, n_k, n_v, type_k, type_v)

    def copy_blocks(self, cache: KVCache, copies: np.ndarray) -> None:
        """Copy blocks within a cache."""
        cache.copy_blocks(copies)

    def read_blocks(self, cache: KVCache, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of blocks."""
        k, v = cache.load(_slots(blocks))
        return k.reshape(-1, KV_BLOCK, *k.shape[1:]), v.reshape(-1, KV_BLOCK, *v.shape[1:])

    def write_blocks(self, cache: KVCache, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into blocks."""
        cache.store(_slots(blocks), k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]))

    def attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: KVCache,
        batch: Batch,
        params: AttentionParams,
        sinks: np.ndarray | None,
    ) -> np.ndarray:
        """Store k and v, then attend."""
        return attend(q, k, v, cache, batch, params, sinks)


def _slots(blocks: np.ndarray) -> np.ndarray:
    """Return the places of the blocks' tokens in the cache."""
    return (blocks[:, None].astype(np.int64) * KV_BLOCK + np.arange(KV_BLOCK)).reshape(-1)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def _largest(values: np.ndarray, columns: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest values of each row (L, N), among equals those of the lowest columns, and their columns."""
    order = np.lexsort((columns, -values, ~np.isnan(values)))[:, :k]
    out = np.full((len(values), 2, k), -np.inf, np.float32)
    out[:, 0, : order.shape[1]] = np.take_along_axis(values, order, 1)
    out[:, 1, : order.shape[1]] = np.take_along_axis(columns, order, 1)
    out[:, 1][out[:, 0] == -np.inf] = -1
    return out.reshape(len(values), 2 * k)
