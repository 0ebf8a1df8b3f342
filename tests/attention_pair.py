"""A backend's attention next to NumPy's, on what the cache has kept of keys and values."""

from __future__ import annotations

import gguf
import numpy as np

from mpillama.backends.attention import KVCache, attend
from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch

_QUANTS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def kept(x: np.ndarray, type: str) -> np.ndarray:
    """Return float32 ``x`` as it comes out of a cache."""
    if type == "f16":
        return x.astype(np.float16).astype(np.float32)
    if type == "bf16":
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16 << 16).view(np.float32)
    if type in _QUANTS:
        return gguf.quants.dequantize(gguf.quants.quantize(x, _QUANTS[type]), _QUANTS[type])
    return x


def coarseness(backend, *types: str) -> int:
    """Return how many times coarser than with floats throughout attention over a cache of these types may be.

    Tiles of bf16 keep 16 bits of scores, and of what they weigh, where the cache keeps no more.
    """
    return 16 if getattr(getattr(backend, "pool", None), "level", "") == "amx" and "f32" not in types else 1


class Pair:
    """A backend and the reference, fed with the same steps of several sequences."""

    def __init__(self, rng, backend, sizes, types=("f32", "f32"), n_blocks=24, n_seqs=1, kv_heads=None, **params):
        self.rng, self.backend, self.types = rng, backend, types
        self.n_head, self.n_head_kv, self.n_k, self.n_v = sizes
        if kv_heads is None:
            kv_heads = tuple(h * self.n_head_kv // self.n_head for h in range(self.n_head))
        self.sinks = rng.standard_normal(self.n_head).astype(np.float32) if params.pop("sinks", False) else None
        settings = {"scale": self.n_k**-0.5, "softcap": 0.0, "window": 0} | params
        self.params = AttentionParams(kv_heads=kv_heads, **settings)
        self.tables = rng.permutation(n_blocks).astype(np.int32).reshape(n_seqs, -1)
        self.cache = backend.new_cache(n_blocks, self.n_head_kv, self.n_k, self.n_v, *types)
        self.reference = KVCache(n_blocks, self.n_head_kv, self.n_k, self.n_v, "f32", "f32")
        self.n_past = [0] * n_seqs
        # Scores of about 10 are rounded in their 24th bit, and so is what they weigh.
        self.tolerance = 1e-5 * coarseness(backend, *types)

    def random(self, *shape):
        return self.rng.standard_normal(shape, dtype=np.float32)

    def batch(self, seq_lens):
        """Return the batch of the next tokens; the tables have -1 where no token was yet."""
        seqs = [s for s, n in enumerate(seq_lens) if n]
        lens = [seq_lens[s] for s in seqs]
        ends = [self.n_past[s] + n for s, n in zip(seqs, lens, strict=True)]
        starts = [self.n_past[s] for s in seqs]
        positions = np.concatenate([np.arange(a, b, dtype=np.int32) for a, b in zip(starts, ends, strict=True)])
        tables = self.tables[seqs].copy()
        for table, end in zip(tables, ends, strict=True):
            table[-(-end // KV_BLOCK) :] = -1
        for s, end in zip(seqs, ends, strict=True):
            self.n_past[s] = end
        n_tokens = len(positions)
        return Batch(np.zeros(n_tokens, np.int32), positions, np.array(lens, np.int32), tables, np.zeros(0, np.int32))

    def inputs(self, n_tokens):
        q = self.random(n_tokens, self.n_head, self.n_k) * np.float32(2)
        k, v = self.random(n_tokens, self.n_head_kv, self.n_k), self.random(n_tokens, self.n_head_kv, self.n_v)
        # What was quantized before is far from where rounding changes sides; see test_rounding.
        return q, kept(k, self.types[0]), kept(v, self.types[1])

    def error(self, *seq_lens):
        """Run a step on the backend, and return norms of its error against float64, and the result.

        The norms are relative to the result's: of all rows together, and of the worst one.
        """
        batch = self.batch(seq_lens)
        q, k, v = self.inputs(len(batch.positions))
        result = self.backend.attention(q, k, v, self.cache, batch, self.params, self.sinks)
        attend(q[:, :0], k, v, self.reference, batch, self.params, None)
        expected = self.exact(q, batch)
        assert result.dtype == np.float32
        wrong, size = (np.linalg.norm(x, axis=-1) for x in (result - expected, expected))
        return np.linalg.norm(wrong) / np.linalg.norm(size), (wrong / size).max(), result

    def exact(self, q, batch):
        """Return attention in float64 over what the reference's cache has."""
        params, out, start = self.params, np.zeros((*q.shape[:2], self.n_v)), 0
        for length, table in zip(batch.seq_lens.tolist(), batch.block_tables, strict=True):
            rows = slice(start, start + length)
            own = batch.positions[rows, None].astype(int)
            others = np.arange(own.max() + 1)
            slots = table[others // KV_BLOCK].astype(int) * KV_BLOCK + others % KV_BLOCK
            # Blocks that nobody sees any more may be gone.
            keys, values = (x.astype(float) for x in self.reference.load(np.maximum(slots, 0)))
            visible = (others <= own) & ((own - others < params.window) if params.window else True)
            for head, kv in enumerate(params.kv_heads):
                scores = q[rows, head].astype(float) @ keys[:, kv].T * params.scale
                if params.softcap:
                    scores = params.softcap * np.tanh(scores / params.softcap)
                scores = np.where(visible, scores, -np.inf)
                sink = -np.inf if self.sinks is None else float(self.sinks[head])
                top = np.maximum(scores.max(axis=1, keepdims=True), sink)
                weights = np.exp(scores - top)
                out[rows, head] = weights @ values[:, kv] / (weights.sum(axis=1, keepdims=True) + np.exp(sink - top))
            start += length
        return out

    def step(self, *seq_lens):
        """Run a step on both, compare, and return the result."""
        batch = self.batch(seq_lens)
        q, k, v = self.inputs(len(batch.positions))
        result = self.backend.attention(q, k, v, self.cache, batch, self.params, self.sinks)
        expected = attend(q, k, v, self.reference, batch, self.params, self.sinks)
        assert result.dtype == np.float32
        np.testing.assert_allclose(result, expected, rtol=self.tolerance, atol=self.tolerance)
        return result
