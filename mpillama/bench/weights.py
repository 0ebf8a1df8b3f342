"""Random weights: tensors that exist only as a rule, by which any rank makes any slice, alike on all of them.

A tensor's blocks are those of an endless repetition of a pool of random blocks, from a place that its name decides.
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from mpillama.backends.base import Backend, RawWeight
from mpillama.backends.quants import SUPPORTED, dequantize
from mpillama.errors import UserError
from mpillama.gguf.reader import GGUFHeader, TensorInfo
from mpillama.gguf.types import GGMLType, row_bytes
from mpillama.models.weights import Weights
from mpillama.sharding import Sharding, Slice
from mpillama.values import Value, Weight

# Blocks of a pool by the size of a block: primes, so that rows are seldom alike; a few MB.
_POOL_BLOCKS = {1: 1_048_573, 32: 131_071, 64: 65_521, 128: 32_749, 256: 16_381}
# Where a block keeps its float16 factor (random bits there could be infinite), and where it keeps that of its minimum
# with the ratio of both that makes the mean of all weights zero.
_FACTORS: dict[GGMLType, tuple[int, tuple[int, float] | None]] = {
    GGMLType.Q4_0: (0, None),
    GGMLType.Q4_1: (0, (2, -7.5)),
    GGMLType.Q5_0: (0, None),
    GGMLType.Q5_1: (0, (2, -15.5)),
    GGMLType.Q8_0: (0, None),
    GGMLType.Q2_K: (80, (82, 1.5)),
    GGMLType.Q3_K: (108, None),
    GGMLType.Q4_K: (0, (2, 7.5)),
    GGMLType.Q5_K: (0, (2, 15.5)),
    GGMLType.Q6_K: (208, None),
    GGMLType.IQ2_XXS: (0, None),
    GGMLType.IQ2_XS: (0, None),
    GGMLType.IQ2_S: (0, None),
    GGMLType.IQ3_XXS: (0, None),
    GGMLType.IQ3_S: (0, None),
    GGMLType.IQ4_NL: (0, None),
    GGMLType.IQ4_XS: (0, None),
}
_FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
RANDOM_TYPES: frozenset[GGMLType] = SUPPORTED & {*_FACTORS, *_FLOATS, GGMLType.MXFP4}
"""The types that random weights can have."""
_ROWS = 1024
# Weights of this size keep activations of a few thousand elements near 1.
_SIZE = 0.02


class RandomTensors:
    """Makes slices of tensors, the way that a reader of files reads them."""

    def __init__(self) -> None:
        self._pools: dict[tuple[GGMLType, bool], np.ndarray] = {}

    def _pool(self, type: GGMLType, is_gain: bool, n_more: int) -> np.ndarray:
        """Return the pool and its first ``n_more`` blocks again, uint8 (blocks, block bytes)."""
        pool = self._pools.get((type, is_gain))
        if pool is None or len(pool) < _POOL_BLOCKS[type.block_size] + n_more:
            blocks = random_blocks(type, _POOL_BLOCKS[type.block_size], is_gain)
            pool = np.resize(blocks, (len(blocks) + n_more, type.block_bytes))
            self._pools[type, is_gain] = pool
        return pool

    def read(self, info: TensorInfo, part: Slice) -> np.ndarray:
        """Return a slice of a tensor, uint8 (n_mats, n_rows, row bytes)."""
        size = info.type.block_bytes
        n_rows, n_cols = part.n_rows, part.row_bytes
        out = np.empty((part.n_mats, n_rows, n_cols), np.uint8)
        if out.size == 0:
            return out
        # Norm weights and sinks are around 1.
        is_gain = len(info.shape) == 1 and info.name.endswith(".weight")
        n_wide = row_bytes(info.type, info.shape[0]) // size
        n_high = info.shape[1] if len(info.shape) > 1 else 1
        pool = self._pool(info.type, is_gain, n_wide)
        n_pool = _POOL_BLOCKS[info.type.block_size]
        origin = zlib.crc32(info.name.encode())
        for mat in range(part.n_mats):
            first = origin + ((part.mat_start + mat) * n_high + part.row_start) * n_wide + part.col_start // size
            if n_cols == n_wide * size:
                _repeat(pool[:n_pool], first % n_pool, out[mat].reshape(-1, size))
            else:
                starts = (first + n_wide * np.arange(n_rows, dtype=np.int64)) % n_pool
                windows = np.lib.stride_tricks.sliding_window_view(pool.reshape(-1), n_cols)
                for row in range(0, n_rows, _ROWS):
                    # Not np.take, which would first copy all windows there are.
                    out[mat, row : row + _ROWS] = windows[::size][starts[row : row + _ROWS]]
        return out


def _repeat(pool: np.ndarray, start: int, out: np.ndarray) -> None:
    """Fill ``out`` with the blocks from ``start`` on, beginning again at the end."""
    done = 0
    while done < len(out):
        n = min(len(out) - done, len(pool) - start)
        out[done : done + n] = pool[start : start + n]
        done, start = done + n, 0


def random_blocks(type: GGMLType, n_blocks: int, is_gain: bool = False) -> np.ndarray:
    """Return blocks of weights around 0 with a standard deviation of about 0.02, uint8 (n_blocks, block bytes).

    With ``is_gain`` the weights (floats only) are around 1. The same arguments give the same blocks.
    """
    rng = np.random.default_rng(int(type))
    if type in _FLOATS:
        x = (rng.standard_normal(n_blocks * type.block_size) * _SIZE + is_gain).astype(np.float32)
        if type == GGMLType.BF16:
            return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(n_blocks, -1)
        return (x if type == GGMLType.F32 else x.astype(np.float16)).view(np.uint8).reshape(n_blocks, -1)
    blocks = rng.integers(0, 256, (n_blocks, type.block_bytes), np.uint8)
    if type == GGMLType.MXFP4:
        # An exponent: 2^(e - 128) times numbers of up to 12.
        blocks[:, 0] = rng.integers(119, 122, n_blocks, np.uint8)
        return blocks
    _set_factors(blocks, type, np.ones(n_blocks))
    spread = float(dequantize(blocks[:1024].copy(), type).std())
    _set_factors(blocks, type, rng.uniform(0.5, 1.5, n_blocks) * _SIZE / spread)
    return blocks


def _set_factors(blocks: np.ndarray, type: GGMLType, factors: np.ndarray) -> None:
    at, minimum = _FACTORS[type]
    blocks[:, at : at + 2] = factors.astype("<f2").view(np.uint8).reshape(-1, 2)
    if minimum:
        at, ratio = minimum
        blocks[:, at : at + 2] = (factors * ratio).astype("<f2").view(np.uint8).reshape(-1, 2)


def random_weights(
    tensors: Mapping[str, TensorInfo],
    sharding: Sharding,
    rank: int,
    backend: Backend,
    progress: Callable[[int], None] = lambda n: None,
) -> Weights:
    """Make a rank's slices and hand them to its backend, as `load_weights` does with slices of a file."""
    matrices: dict[str, Weight] = {}
    vectors: dict[str, Value] = {}
    source = RandomTensors()
    by_place: dict[int, Weight] = {}
    for info in filter(sharding.holds, tensors.values()):
        place = sharding.placement(info)
        is_matrix = info.name.endswith(".weight") and len(info.shape) > 1
        if is_matrix and info.offset in by_place:
            matrices[info.name] = by_place[info.offset]
            continue
        part = sharding.slice_of(info, rank)
        raw = RawWeight(info.name, info.type, source.read(info, part), part.n_in, part.pad)
        if is_matrix:
            weight = Weight(info.name, backend.weight(raw), place.axis, place.cut)
            matrices[info.name] = by_place[info.offset] = weight
        else:
            rows = backend.vector(raw)
            data = rows if len(info.shape) > 1 else rows[0]
            vectors[info.name] = Value(data, place.layout)
        progress(part.nbytes)
    return Weights(matrices, vectors)


def write_random_gguf(path: Path, header: GGUFHeader) -> None:
    """Write the model of a random header as a file, for programs that need one.

    Raises:
        UserError: there is no room for it, or it cannot be written.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    free = shutil.disk_usage(path.parent).free
    if free < header.file_bytes + (64 << 20):
        raise UserError(
            f"{path.parent} has {free / 1e9:.1f} GB free, but the file of this shape takes "
            f"{header.file_bytes / 1e9:.1f} GB; set TMPDIR to a folder with more room"
        )
    writer = GGUFWriter(path, str(header.metadata["general.architecture"]))
    for key, value in header.metadata.items():
        if key == "general.architecture":
            continue
        add = writer.add_string if isinstance(value, str) else writer.add_uint32
        (writer.add_float32 if isinstance(value, float) else add)(key, value)
    source = RandomTensors()
    shapes = {name: (*info.shape[:0:-1], row_bytes(info.type, info.shape[0])) for name, info in header.tensors.items()}
    for name, info in header.tensors.items():
        kind = GGMLQuantizationType(int(info.type))
        writer.add_tensor_info(name, shapes[name], np.dtype(np.uint8), info.nbytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for info in header.tensors.values():
            n_rows, n_mats = (*info.shape[1:], 1, 1)[:2]
            whole = Slice(0, n_rows, 0, row_bytes(info.type, info.shape[0]), n_mats, info.shape[0])
            writer.write_tensor_data(source.read(info, whole))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    finally:
        writer.close()
