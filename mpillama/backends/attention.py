"""Attention over a blocked KV cache in NumPy."""

from __future__ import annotations

import numpy as np

from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch
from mpillama.backends.kv_codec import check_cache_type

# Scores of one step are made for so many elements at a time.
_SCORE_ELEMENTS = 4 << 20


class KVCache:
    """Keys and values of one block of the model, (tokens, G, D).

    f32 and f16 are kept as such, bf16 as the upper half of f32, q8_0 and q4_0 as the float32 numbers they stand for.
    """

    def __init__(self, n_blocks: int, n_head_kv: int, n_k: int, n_v: int, type_k: str, type_v: str) -> None:
        check_cache_type("keys", type_k, n_k)
        check_cache_type("values", type_v, n_v)
        n_tokens = n_blocks * KV_BLOCK
        self._k = np.zeros((n_tokens, n_head_kv, n_k), _STORAGE.get(type_k, np.float32))
        self._v = np.zeros((n_tokens, n_head_kv, n_v), _STORAGE.get(type_v, np.float32))
        self._types = (type_k, type_v)

    def store(self, slots: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values of tokens into their slots."""
        self._k[slots] = _rounded(k, self._types[0])
        self._v[slots] = _rounded(v, self._types[1])

    def load(self, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values of slots as float32."""
        where: np.ndarray | slice = slots
        if len(slots) and slots[-1] - slots[0] == len(slots) - 1 and (np.diff(slots) == 1).all():
            where = slice(int(slots[0]), int(slots[-1]) + 1)
        k, v = self._k[where], self._v[where]
        return (
            _widen_bf16(k) if self._types[0] == "bf16" else k.astype(np.float32, copy=False),
            _widen_bf16(v) if self._types[1] == "bf16" else v.astype(np.float32, copy=False),
        )

    def copy_blocks(self, copies: np.ndarray) -> None:
        """Copy blocks (source, destination) as they are stored."""
        for stored in (self._k, self._v):
            blocks = stored.reshape(len(stored) // KV_BLOCK, KV_BLOCK, *stored.shape[1:])
            blocks[copies[:, 1]] = blocks[copies[:, 0]]


_STORAGE = {"f16": np.float16, "bf16": np.uint16}


def _rounded(x: np.ndarray, type: str) -> np.ndarray:
    if type == "bf16":
        return _round_bf16(x)
    return _QUANTIZE[type](x) if type in _QUANTIZE else x


def _q8_0(x: np.ndarray) -> np.ndarray:
    """Round blocks of 32 to 8 bits and a half-precision factor, max |x| / 127."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, 32)
    factor = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    q = np.rint(np.divide(blocks, factor, out=np.zeros_like(blocks), where=factor > 0))
    return (q * factor.astype(np.float16).astype(np.float32)).reshape(x.shape)


def _q4_0(x: np.ndarray) -> np.ndarray:
    """Round blocks of 32 to 4 bits and a half-precision factor, such that the largest becomes -8."""
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, 32)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    factor = largest / np.float32(-8)
    q = np.divide(blocks, factor, out=np.zeros_like(blocks), where=factor != 0)
    q = np.clip(np.floor(q + np.float32(8.5)), 0, 15) - 8
    return (q * factor.astype(np.float16).astype(np.float32)).reshape(x.shape)


_QUANTIZE = {"q8_0": _q8_0, "q4_0": _q4_0}


def _round_bf16(x: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even, as its 16 bits."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _widen_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    cache: KVCache,
    batch: Batch,
    params: AttentionParams,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """Store the step's k and v, then attend causally within each sequence; see `Backend.attention`."""
    out = np.zeros((q.shape[0], q.shape[1], v.shape[2]), np.float32)
    start = 0
    for seq_len, table in zip(batch.seq_lens.tolist(), batch.block_tables, strict=True):
        rows = slice(start, start + seq_len)
        positions = batch.positions[rows].astype(np.int64)
        slots = table[positions // KV_BLOCK].astype(np.int64) * KV_BLOCK + positions % KV_BLOCK
        cache.store(slots, k[rows], v[rows])
        if q.shape[1]:
            out[rows] = _attend_one(q[rows], positions, table, cache, params, sinks)
        start += seq_len
    return out


def _attend_one(
    q: np.ndarray,
    positions: np.ndarray,
    table: np.ndarray,
    cache: KVCache,
    params: AttentionParams,
    sinks: np.ndarray | None,
) -> np.ndarray:
    """Attend from one sequence's new tokens (T, H, D) to all of its tokens so far."""
    first = max(0, int(positions[0]) - params.window + 1) if params.window else 0
    seen = np.arange(first, int(positions[-1]) + 1)
    keys, values = cache.load(table[seen // KV_BLOCK].astype(np.int64) * KV_BLOCK + seen % KV_BLOCK)
    heads = list(params.kv_heads)
    n_groups = keys.shape[1]
    even = len(heads) % max(1, n_groups) == 0 and heads == [h * n_groups // len(heads) for h in range(len(heads))]
    n_tokens, n_head, n_dim = q.shape
    out = np.empty((n_tokens, n_head, values.shape[2]), np.float32)
    step = max(1, _SCORE_ELEMENTS // (n_head * len(seen)))
    for start in range(0, n_tokens, step):
        part = slice(start, min(n_tokens, start + step))
        hidden = seen[None, :] > positions[part, None]
        if params.window:
            hidden |= positions[part, None] - seen[None, :] >= params.window
        if even:
            # Query heads of one group lie next to each other: one product for each KV head, without copying keys.
            grouped = q[part].reshape(-1, n_groups, n_head // n_groups, n_dim).transpose(1, 2, 0, 3)
            scores = np.matmul(grouped, keys.transpose(1, 2, 0)[:, None]).reshape(n_head, -1, len(seen))
        else:
            scores = np.matmul(q[part].transpose(1, 0, 2), keys.transpose(1, 2, 0)[heads])
        weights = _softmax_with_sinks(scores, hidden, params, sinks)
        if even:
            by_group = weights.reshape(n_groups, n_head // n_groups, -1, len(seen))
            mixed = np.matmul(by_group, values.transpose(1, 0, 2)[:, None]).reshape(n_head, -1, values.shape[2])
        else:
            mixed = np.matmul(weights, values.transpose(1, 0, 2)[heads])
        out[part] = mixed.transpose(1, 0, 2)
    return out


def _softmax_with_sinks(
    scores: np.ndarray, hidden: np.ndarray, params: AttentionParams, sinks: np.ndarray | None
) -> np.ndarray:
    """Turn scores (H, T, C) into weights in place; a sink is one more logit of a head, whose weight goes nowhere."""
    scores *= np.float32(params.scale)
    if params.softcap:
        scores /= np.float32(params.softcap)
        np.tanh(scores, out=scores)
        scores *= np.float32(params.softcap)
    scores[:, hidden] = -np.inf
    top = scores.max(axis=-1, keepdims=True)
    if sinks is not None:
        top = np.maximum(top, sinks[:, None, None])
    scores -= top
    np.exp(scores, out=scores)
    total = scores.sum(axis=-1, keepdims=True)
    if sinks is not None:
        total += np.exp(sinks[:, None, None] - top)
    scores /= total
    return scores
