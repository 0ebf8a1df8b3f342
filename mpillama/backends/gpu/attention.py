"""The KV cache of the GPU backend, and attention over it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch, HeadNorms
from mpillama.backends.gpu.device import SHARED_BYTES, Array, Device, Unit
from mpillama.backends.gpu.elementwise import GpuRopeTable
from mpillama.backends.gpu.inputs import StepInputs
from mpillama.backends.gpu.launcher import int32
from mpillama.backends.gpu.matmul import MatmulOps
from mpillama.backends.gpu.rounded import Rounded
from mpillama.backends.kv_codec import CACHE_TYPES, check_cache_type, decode, encode
from mpillama.gguf.types import GGMLType, row_bytes

_WARPS = 4  # of a thread block of attention.cu
_MAX_ROWS = 8
# A split has at least so many keys: one tile of 32 for each warp.
_SPLIT_KEYS = 128
# Query rows of a thread block of attention_mma.cu, 16 for each warp: few, or as many as the registers allow.
_TILE_ROWS = 32, 128


@dataclass(frozen=True)
class GpuCache:
    """Keys and values of one block of the model: uint8 (KV blocks, G, KV_BLOCK, row bytes).

    Attributes:
        unit: the kernels for it.
        tiles: those on matrix units, if the device and the cache are such.
    """

    keys: Array
    values: Array
    n_head_kv: int
    n_k: int
    n_v: int
    unit: Unit
    tiles: Unit | None
    type_k: str
    type_v: str

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return int(self.keys.nbytes + self.values.nbytes)


@dataclass(frozen=True)
class _Heads:
    """Runs of query heads that share a KV head, on the device: see `_groups`."""

    n_groups: int
    largest: int
    groups: Array
    heads: Array


@dataclass(frozen=True)
class _Call:
    """What one call of `AttentionOps.attention` is about, once keys and values are stored."""

    q: Array
    cache: GpuCache
    tables: StepInputs
    params: AttentionParams
    sinks: Array | None
    out: Array

    def most_splits(self, longest: int) -> int:
        """Return how often the keys that so many tokens see can be split.

        Nothing that it depends on changes as long as the bound stays: a recorded step serves for all of them.
        """
        n_seen, window = self.tables.n_seen, self.params.window
        return -(-(min(n_seen, window + longest) if window else n_seen) // _SPLIT_KEYS)


class AttentionOps(MatmulOps):
    """The ops of `Backend` that need a KV cache.

    Scores, weights and sums are float32. On NVIDIA's matrix units (`Device.matrix_units`) sequences with more than a
    few query rows in a step have queries and weights rounded to float16, unless keys or values are kept as f32. A
    score, which is a sum of products, is then wrong by at most 2^-11 of the sum of their sizes.
    """

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._heads: dict[tuple[tuple[int, ...], int], _Heads] = {}

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
        unit = attention_unit(k, v, n_v, self.device.warp)
        tiles = tiles_unit(k, v, n_k, n_v) if self.device.matrix_units and self.device.warp == 32 else None
        return GpuCache(keys, values, n_head_kv, n_k, n_v, unit, tiles, type_k, type_v)

    def copy_blocks(self, cache: GpuCache, copies: np.ndarray) -> None:
        """Copy blocks of keys and values within a cache, as they are stored; see `Batch.copies`."""
        source, target = (self.device.upload(int32(column)) for column in copies.T)
        for stored in (cache.keys, cache.values):
            self.move_rows(stored, source, stored, target)

    def read_blocks(self, cache: GpuCache, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the numbers of blocks; see `Backend.read_blocks`."""
        index = self.device.upload(int32(blocks))

        def read(stored: Array, type: str) -> np.ndarray:
            found = self.device.empty((len(blocks), *stored.shape[1:]), np.uint8)
            self.move_rows(stored, index, found, None)
            return decode(self.device.download(found).transpose(0, 2, 1, 3), type)

        return read(cache.keys, cache.type_k), read(cache.values, cache.type_v)

    def write_blocks(self, cache: GpuCache, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into blocks."""
        index = self.device.upload(int32(blocks))
        for stored, type, x in ((cache.keys, cache.type_k, k), (cache.values, cache.type_v, v)):
            kept = self.device.upload(np.ascontiguousarray(encode(x, type).transpose(0, 2, 1, 3)))
            self.move_rows(kept, None, stored, index)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: GpuCache,
        batch: Batch,
        params: AttentionParams,
        sinks: Array | None,
        rope: GpuRopeTable | None = None,
        norms: HeadNorms | None = None,
        biases: tuple[Array | None, ...] = (None, None, None),
    ) -> Array:
        """Add biases, norm the heads of q and k, rotate them, store k and v of the step's tokens, then attend.

        See `Backend.attention` and `Joining`.

        Raises:
            ValueError: sizes or indices do not fit together; a mistake of the caller.
        """
        _check(q, k, v, cache, batch, params)
        if self.inputs is None or self.inputs.batch is not batch:
            self.inputs = StepInputs(self.device, batch)
        self.inputs.check(int(cache.keys.shape[0]), params.window)
        q = self._store(q, k, v, cache, self.inputs, rope, norms, biases)
        out = self.device.empty((*q.shape[:2], cache.n_v))
        if out.size:
            self._attend(_Call(q, cache, self.inputs, params, sinks, out))
        return out

    def _store(
        self,
        q: Array,
        k: Array,
        v: Array,
        cache: GpuCache,
        tables: StepInputs,
        rope: GpuRopeTable | None,
        norms: HeadNorms | None,
        biases: tuple[Array | None, ...],
    ) -> Array:
        """Store k and v, after all that comes before; returns the queries after that."""
        n_tokens, n_head, n_kv = int(q.shape[0]), int(q.shape[1]), cache.n_head_kv
        as_is = rope is None and norms is None and biases[0] is None
        turned = q if as_is else self.device.empty(tuple(q.shape))
        n_rows = n_tokens * (2 * n_kv if as_is else n_head + 2 * n_kv)
        if not n_rows:
            return turned
        weights = (None, None, np.float32(0)) if norms is None else (norms.q, norms.k, np.float32(norms.eps))
        wide = n_head * cache.n_k, n_kv * cache.n_k, n_kv * cache.n_v, cache.n_k, cache.n_k
        if any(x is not None and x.size != size for x, size in zip((*biases, *weights[:2]), wide, strict=True)):
            raise ValueError(f"biases or norms are not as wide as heads of {cache.n_k} and {cache.n_v}")
        pairs = (None, None, np.int32(0), np.int32(0))
        if rope is not None:
            pairs = rope.cos, rope.sin, np.int32(rope.neox), np.int32(rope.cos.shape[1])
        where = tables.positions, tables.sequences, tables.tables, np.int32(tables.tables.shape[1])
        sizes = np.int32(n_tokens), np.int32(n_head), np.int32(n_kv), np.int32(cache.n_k), np.int32(cache.n_v)
        results = (None if as_is else turned), cache.keys, cache.values
        args = q, k, v, *biases, *weights, *pairs, *where, *sizes, *results
        shared = 4 * _WARPS * max(cache.n_k, cache.n_v)
        self.device.launch(cache.unit, "store", (-(-n_rows // _WARPS),), _WARPS * self.device.warp, args, shared)
        return turned

    def _attend(self, call: _Call) -> None:
        tiles = call.cache.tiles
        if tiles is None:
            self._attend_few(call, rounded=self._new_rounded_heads(call.out))
            return
        groups = self._groups_of(call.params.kv_heads, max(_TILE_ROWS))
        # So many tokens of a sequence are more rows than a thread block of attention.cu has.
        many = max(2, _MAX_ROWS // groups.largest + 1)
        n_many = self._attend_many(call, tiles, groups, many)
        self._attend_few(call, many, None if n_many else self._new_rounded_heads(call.out))

    def _new_rounded_heads(self, out: Array) -> Rounded | None:
        """Return arrays for the result in 8 bits too, as the product that follows takes it, or None."""
        rows = out.reshape(int(out.shape[0]), -1)
        # Each head is rounded by itself.
        if out.shape[-1] % 32 or not self._is_rounded(rows):
            return None
        return self.new_rounded(rows, int(rows.shape[-1]))

    def _attend_few(self, call: _Call, below: int = 0, rounded: Rounded | None = None) -> None:
        """Attend from sequences with less than so many tokens, or from all if it is 0."""
        cache, warp = call.cache, self.device.warp
        # More would not fit into registers.
        max_rows = _MAX_ROWS if cache.n_v <= 4 * warp else _MAX_ROWS // 2
        groups = self._groups_of(call.params.kv_heads, max_rows)
        tiles, n_tiles, longest = call.tables.tiles(max_rows // groups.largest, below=below)
        if not n_tiles:
            return
        n_rows = next(n for n in (1, 2, 4, 8) if n >= groups.largest * longest)
        # Four blocks on each multiprocessor, as far as there are keys for them: a warp has 1 to 2 KB on their way from
        # memory, and it takes 16 warps to keep that busy.
        n_split = min(-(-4 * self.device.n_cores // (groups.n_groups * n_tiles)), call.most_splits(longest))
        shared = 4 * (n_rows * cache.n_k + _WARPS * n_rows * (warp + 2) + _WARPS * cache.n_v)
        kernel = cache.unit, f"attend_{n_rows}", _WARPS * warp, shared
        sizes = np.int32(cache.n_k), np.int32(cache.n_v)
        finish = self.counters, *(rounded or [None] * 3)
        self._start(call, kernel, groups, tiles, (groups.n_groups, n_tiles, n_split), n_rows, sizes, finish)

    def _attend_many(self, call: _Call, unit: Unit, groups: _Heads, least: int) -> int:
        """Attend from sequences with at least so many tokens, on matrix units; returns of how many tiles they are."""
        cache = call.cache
        tiles, n_tiles, longest = call.tables.tiles(max(_TILE_ROWS) // groups.largest, least=least)
        if not n_tiles:
            return 0
        n_rows = next(n for n in _TILE_ROWS if n >= groups.largest * longest)
        n_warps = n_rows // 16
        # A block fills a multiprocessor: more blocks than that only add to what has to be joined.
        n_split = max(1, min(self.device.n_cores // (groups.n_groups * n_tiles), call.most_splits(longest)))
        shared = _tile_bytes(dict(unit.defines)["MPL_KEYS"], cache.n_k, cache.n_v)
        kernel = unit, f"attend_tiles_{n_warps}", n_warps * self.device.warp, shared
        self._start(call, kernel, groups, tiles, (groups.n_groups, n_tiles, n_split), n_rows, ())
        return n_tiles

    def _start(
        self,
        call: _Call,
        kernel: tuple[Unit, str, int, int],
        groups: _Heads,
        tiles: Array,
        grid: tuple[int, int, int],
        n_rows: int,
        sizes: tuple[np.int32, ...],
        finish: tuple[Array | None, ...] = (),
    ) -> None:
        """Start a kernel that attends, and what joins its splits, if it does not do so itself.

        Args:
            call: what it is about.
            kernel: unit, name, threads of a block, bytes of shared memory.
            groups: heads that share a block.
            tiles: tokens that do.
            grid: number of groups, tiles and splits.
            n_rows: of a block, at most.
            sizes: of heads, for a kernel that is not compiled for them.
            finish: counters, and arrays for 8 bits or None, for a kernel that joins its splits itself.
        """
        cache, tables, params = call.cache, call.tables, call.params
        n_groups, n_tiles, n_split = grid
        plan = tiles, groups.groups, groups.heads
        part = self.device.empty((n_tiles * n_groups * n_split * n_rows * (cache.n_v + 2),)) if n_split > 1 else None
        n_head, n_v = np.int32(call.q.shape[1]), np.int32(cache.n_v)
        where = tables.positions, tables.sequences, tables.tables, np.int32(tables.tables.shape[1])
        fixed = np.float32(params.scale), np.float32(params.softcap), np.int32(params.window), call.sinks
        heads = n_head, np.int32(cache.n_head_kv), *sizes
        args = call.q, cache.keys, cache.values, *where, *plan, *heads, *fixed, part, call.out
        unit, name, n_threads, shared = kernel
        self.device.launch(unit, name, grid, n_threads, (*args, *finish), shared)
        if part is not None and not finish:
            rest = part, np.int32(n_split), np.int32(n_rows), *plan, n_head, n_v, call.sinks, call.out
            self.device.launch(cache.unit, "combine", (n_groups, n_tiles, n_rows), self.device.warp, rest)

    def _groups_of(self, kv_heads: tuple[int, ...], max_rows: int) -> _Heads:
        known = self._heads.get((kv_heads, max_rows))
        if known is None:
            groups, heads = _groups(kv_heads, max_rows)
            arrays = self.device.upload(groups), self.device.upload(int32(heads))
            known = self._heads[kv_heads, max_rows] = _Heads(len(groups), int(groups[:, 2].max()), *arrays)
        return known


def attention_unit(type_k: GGMLType, type_v: GGMLType, n_v: int, warp: int) -> Unit:
    """Return the kernels for a cache of these types."""
    pairs = next(pairs for pairs in (1, 2, 4, 8, 16, 32) if 2 * warp * pairs >= n_v)
    return Unit("attention.cu", (("MPL_K_TYPE", int(type_k)), ("MPL_V_TYPE", int(type_v)), ("MPL_PAIRS", pairs)))


def tiles_unit(type_k: GGMLType, type_v: GGMLType, n_k: int, n_v: int) -> Unit | None:
    """Return the kernel on matrix units for a cache of these types and sizes, if there is one for it."""
    # Longer ones do not fit into registers.
    fits = n_k % 16 == n_v % 16 == 0 and max(n_k, n_v) <= 256
    if not fits or GGMLType.F32 in (type_k, type_v):
        return None
    keys = 64 if _tile_bytes(64, n_k, n_v) <= SHARED_BYTES else 32
    sizes = ("MPL_N_K", n_k), ("MPL_N_V", n_v), ("MPL_KEYS", keys)
    return Unit("attention_mma.cu", (("MPL_K_TYPE", int(type_k)), ("MPL_V_TYPE", int(type_v)), *sizes))


def _tile_bytes(n_keys: int, n_k: int, n_v: int) -> int:
    """Return the shared memory of attention_mma.cu: float16 rows with 16 bytes between them."""
    return n_keys * (2 * n_k + 16 + 2 * n_v + 16)


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


def _check(q: Array, k: Array, v: Array, cache: GpuCache, batch: Batch, params: AttentionParams) -> None:
    """Make sure that no kernel reads or writes outside of its arrays; see also `StepInputs.check`."""
    n_tokens = len(batch.positions)
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
