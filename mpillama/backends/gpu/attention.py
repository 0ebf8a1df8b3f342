"""The KV cache of the GPU backend, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch
from mpillama.backends.gpu.device import Array, Unit
from mpillama.backends.gpu.launcher import int32
from mpillama.backends.gpu.matmul import MatmulOps
from mpillama.backends.kv_codec import CACHE_TYPES, check_cache_type, decode, encode
from mpillama.gguf.types import GGMLType, row_bytes

_WARPS = 4  # of a thread block of attention.cu
_MAX_ROWS = 8
# A split has at least so many keys.
_SPLIT_KEYS = 256


@dataclass(frozen=True)
class GpuCache:
    """Keys and values of one block of the model: uint8 (KV blocks, G, KV_BLOCK, row bytes)."""

    keys: Array
    values: Array
    n_head_kv: int
    n_k: int
    n_v: int
    unit: Unit
    type_k: str
    type_v: str

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.keys.nbytes + self.values.nbytes)


@dataclass(frozen=True)
class _Tables:
    """A step's tokens on the device, and what of the batch they were made of.

    Attributes:
        source: copies of positions, seq_lens and block_tables.
        positions: int32 (T,).
        sequences: int32 (T,), the row of each token's sequence in ``tables``.
        tables: int32 (S, B).
    """

    source: tuple[np.ndarray, ...]
    positions: Array
    sequences: Array
    tables: Array


class AttentionOps(MatmulOps):
    """The ops of `Backend` that need a KV cache; scores, weights and sums are float32."""

    _tables: _Tables | None = None

    def new_cache(self, n_blocks: int, n_head_kv: int, n_k: int, n_v: int, type_k: str, type_v: str) -> GpuCache:
        """Reserve the KV cache of one block of the model, for n_blocks * KV_BLOCK tokens.

        Raises:
            UsageError: there is no such type, or it keeps blocks of 32 and the heads are not made of such.
        """
        check_cache_type("keys", type_k, n_k)
        check_cache_type("values", type_v, n_v)
        k, v = CACHE_TYPES[type_k], CACHE_TYPES[type_v]
        rows = n_blocks, n_head_kv, KV_BLOCK
        keys = self.device.empty((*rows, row_bytes(k, n_k)), np.uint8)
        values = self.device.empty((*rows, row_bytes(v, n_v)), np.uint8)
        return GpuCache(keys, values, n_head_kv, n_k, n_v, attention_unit(k, v, n_v, self.device.warp), type_k, type_v)

    def copy_blocks(self, cache: GpuCache, copies: np.ndarray) -> None:
        """Copy blocks of keys and values within a cache, as they are stored; see `Batch.copies`."""
        source, target = (self.device.upload(np.ascontiguousarray(column)) for column in copies.T)
        for stored in (cache.keys, cache.values):
            stored[target] = stored[source]

    def read_blocks(self, cache: GpuCache, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of blocks; see `Backend.read_blocks`."""
        index = self.device.upload(np.ascontiguousarray(blocks))
        kinds = ((cache.keys, cache.type_k), (cache.values, cache.type_v))
        k, v = (decode(self.device.download(stored[index]).transpose(0, 2, 1, 3), type) for stored, type in kinds)
        return k, v

    def write_blocks(self, cache: GpuCache, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into blocks."""
        index = self.device.upload(np.ascontiguousarray(blocks))
        for stored, type, x in ((cache.keys, cache.type_k, k), (cache.values, cache.type_v, v)):
            stored[index] = self.device.upload(np.ascontiguousarray(encode(x, type).transpose(0, 2, 1, 3)))

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: GpuCache,
        batch: Batch,
        params: AttentionParams,
        sinks: Array | None,
    ) -> Array:
        """Store k and v of the step's tokens, then attend; see `Backend.attention`.

        Raises:
            ValueError: sizes or indices do not fit together; a mistake of the caller.
        """
        _check(q, k, v, cache, batch, params)
        tables = self._upload_tables(batch)
        self._store(k, v, cache, tables)
        out = self.device.empty((*q.shape[:2], cache.n_v))
        if out.size:
            self._attend(q, cache, tables, params, sinks, out)
        return out

    def _upload_tables(self, batch: Batch) -> _Tables:
        source = batch.positions, batch.seq_lens, batch.block_tables
        known = self._tables
        if known is None or not all(np.array_equal(a, b) for a, b in zip(known.source, source, strict=True)):
            sequences = np.repeat(np.arange(len(batch.seq_lens)), batch.seq_lens)
            arrays = (self.device.upload(int32(x)) for x in (batch.positions, sequences, batch.block_tables))
            known = self._tables = _Tables(tuple(x.copy() for x in source), *arrays)
        return known

    def _store(self, k: Array, v: Array, cache: GpuCache, tables: _Tables) -> None:
        n_tokens, n_kv = int(k.shape[0]), cache.n_head_kv
        n_threads = n_tokens * n_kv * max(cache.n_k, cache.n_v)
        if not n_threads:
            return
        sizes = np.int32(tables.tables.shape[1]), np.int32(n_tokens), np.int32(n_kv), np.int32(cache.n_k)
        args = k, v, tables.positions, tables.sequences, tables.tables, *sizes, np.int32(cache.n_v)
        grid = (-(-n_threads // 256), 2)
        self.device.launch(cache.unit, "store", grid, 256, (*args, cache.keys, cache.values))

    def _attend(
        self, q: Array, cache: GpuCache, tables: _Tables, params: AttentionParams, sinks: Array | None, out: Array
    ) -> None:
        # More would not fit into registers.
        max_rows = _MAX_ROWS if cache.n_v <= 4 * self.device.warp else _MAX_ROWS // 2
        groups, heads = _groups(params.kv_heads, max_rows)
        largest = int(groups[:, 2].max())
        positions, seq_lens, _ = tables.source
        tiles = _tiles(seq_lens, max_rows // largest)
        n_rows = next(n for n in (1, 2, 4, 8) if n >= largest * int(tiles[:, 1].max()))
        n_groups, n_tiles = len(groups), len(tiles)
        n_seen = int(positions.max()) + 1
        if params.window:
            n_seen = min(n_seen, params.window + int(tiles[:, 1].max()))
        # Enough blocks to fill the device twice, as far as there are keys for them.
        n_split = min(-(-2 * self.device.n_cores // (n_groups * n_tiles)), -(-n_seen // _SPLIT_KEYS))
        # What does not change from step to step could stay on the device; it is a few hundred bytes.
        plan = [self.device.upload(int32(x)) for x in (tiles, groups, heads)]
        part = self.device.empty((n_tiles * n_groups * n_split * n_rows * (cache.n_v + 2),)) if n_split > 1 else None
        n_head, warp = np.int32(q.shape[1]), self.device.warp
        sizes = n_head, np.int32(cache.n_head_kv), np.int32(cache.n_k), np.int32(cache.n_v)
        fixed = np.float32(params.scale), np.float32(params.softcap), np.int32(params.window)
        where = tables.positions, tables.sequences, tables.tables, np.int32(tables.tables.shape[1])
        args = q, cache.keys, cache.values, *where, *plan, *sizes, *fixed, sinks, part, out
        shared = 4 * (n_rows * cache.n_k + _WARPS * n_rows * (warp + 2) + _WARPS * cache.n_v)
        grid = n_groups, n_tiles, n_split
        self.device.launch(cache.unit, f"attend_{n_rows}", grid, _WARPS * warp, args, shared)
        if part is not None:
            args = part, np.int32(n_split), np.int32(n_rows), *plan, n_head, np.int32(cache.n_v), sinks, out
            self.device.launch(cache.unit, "combine", (n_groups, n_tiles, n_rows), 2 * warp, args)


def attention_unit(type_k: GGMLType, type_v: GGMLType, n_v: int, warp: int) -> Unit:
    """Return the kernels for a cache of these types."""
    pairs = next(pairs for pairs in (1, 2, 4, 8, 16, 32) if 2 * warp * pairs >= n_v)
    return Unit("attention.cu", (("MPL_K_TYPE", int(type_k)), ("MPL_V_TYPE", int(type_v)), ("MPL_PAIRS", pairs)))


def _groups(kv_heads: tuple[int, ...], max_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Return runs of at most ``max_heads`` query heads of one KV head, (n, 3): KV head, first, count; and the heads."""
    order = np.argsort(np.array(kv_heads), kind="stable")
    found: list[tuple[int, int, int]] = []
    for i, head in enumerate(order.tolist()):
        kv = kv_heads[head]
        if found and found[-1][0] == kv and found[-1][2] < max_heads:
            found[-1] = kv, found[-1][1], found[-1][2] + 1
        else:
            found.append((kv, i, 1))
    return np.array(found, np.int32), order


def _tiles(seq_lens: np.ndarray, max_tokens: int) -> np.ndarray:
    """Return runs of at most ``max_tokens`` tokens of one sequence, (n, 2): first, count."""
    found, start = [], 0
    for length in seq_lens.tolist():
        stop = start + length
        found += [(first, min(max_tokens, stop - first)) for first in range(start, stop, max_tokens)]
        start = stop
    return np.array(found, np.int32)


def _check(q: Array, k: Array, v: Array, cache: GpuCache, batch: Batch, params: AttentionParams) -> None:
    """Make sure that no kernel reads or writes outside of its arrays."""
    n_tokens, n_blocks = len(batch.positions), int(cache.keys.shape[0])
    expected = {
        "q": (q, (n_tokens, len(params.kv_heads), cache.n_k)),
        "k": (k, (n_tokens, cache.n_head_kv, cache.n_k)),
        "v": (v, (n_tokens, cache.n_head_kv, cache.n_v)),
    }
    for name, (x, shape) in expected.items():
        if tuple(x.shape) != shape:
            raise ValueError(f"{name} is {tuple(x.shape)}, not {shape}")
    if params.kv_heads and not 0 <= min(params.kv_heads) <= max(params.kv_heads) < cache.n_head_kv:
        raise ValueError(f"KV heads {params.kv_heads}, but there are {cache.n_head_kv}")
    if int(batch.seq_lens.sum()) != n_tokens or (batch.seq_lens < 1).any():
        raise ValueError(f"sequences of {batch.seq_lens.tolist()} tokens, but there are {n_tokens} positions")
    ends = np.cumsum(batch.seq_lens)
    starts = ends - batch.seq_lens
    jumps = np.flatnonzero(np.diff(batch.positions) != 1) + 1
    if n_tokens and not np.isin(jumps, starts).all():
        raise ValueError("the positions of a sequence do not follow each other")
    for first, end, table in zip(starts.tolist(), ends.tolist(), batch.block_tables, strict=True):
        low, high = int(batch.positions[first]), int(batch.positions[end - 1])
        oldest = max(0, low - params.window + 1) if params.window else 0
        used = table[oldest // KV_BLOCK : high // KV_BLOCK + 1]
        if low < 0 or high // KV_BLOCK >= len(table) or (used < 0).any() or (used >= n_blocks).any():
            raise ValueError(f"positions {low} to {high} are in blocks {used.tolist()} of {n_blocks}")
