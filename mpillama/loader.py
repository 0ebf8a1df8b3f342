"""Slices of files as weights: a rank reads the bytes that it owns, in the order of the file, and nothing else.

Reads are plain ``pread`` calls into the arrays that are kept: on a parallel file system page faults through a memory
map are slower by orders of magnitude, and a copy would double a rank's memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Mapping

import numpy as np

from mpillama.backends.base import Backend, RawWeight
from mpillama.errors import GGUFError, ModelError
from mpillama.gguf.reader import TensorInfo
from mpillama.models.weights import Weights
from mpillama.ops import Value, Weight
from mpillama.sharding import Sharding, Slice

# Large enough for a parallel file system's stripes, small enough for a moving progress bar.
_READ_BYTES = 32 << 20


class SliceReader:
    """Reads slices of tensors from a model's files, and counts the bytes."""

    def __init__(self, paths: Iterable[str], progress: Callable[[int], None]) -> None:
        self._paths, self._progress = tuple(paths), progress
        self._files: dict[int, int] = {}
        self._buffer: np.ndarray | None = None
        self.bytes_read = 0

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._files.values():
            os.close(fd)

    def read(self, info: TensorInfo, part: Slice, borrowed: bool = False) -> np.ndarray:
        """Return a slice of a tensor, uint8 (n_mats, n_rows, row bytes); one that is ``borrowed`` until the next call.

        Raises:
            GGUFError: the file cannot be read, or has become shorter.
        """
        n_rows, n_cols = part.row_stop - part.row_start, part.col_stop - part.col_start
        out = self._array((part.n_mats, n_rows, n_cols), borrowed)
        if out.size == 0:
            return out
        mat_bytes = info.nbytes // (info.shape[2] if len(info.shape) > 2 else 1)
        stride = mat_bytes // (info.shape[1] if len(info.shape) > 1 else 1)
        first = info.offset + part.mat_start * mat_bytes
        try:
            if n_cols < stride:
                for mat in range(part.n_mats):
                    start = first + mat * mat_bytes + part.row_start * stride + part.col_start
                    for row in range(n_rows):
                        self._fill(info, out[mat, row], start + row * stride)
            elif n_rows * stride < mat_bytes:
                for mat in range(part.n_mats):
                    self._fill(info, out[mat].reshape(-1), first + mat * mat_bytes + part.row_start * stride)
            else:
                self._fill(info, out.reshape(-1), first)
        except OSError as error:
            raise GGUFError(f"{self._paths[info.part]}: cannot read {info.name}: {error.strerror}") from error
        return out

    def _array(self, shape: tuple[int, int, int], borrowed: bool) -> np.ndarray:
        # Memory that is new to the process costs as much time as reading into it.
        if not borrowed:
            return np.empty(shape, np.uint8)
        n = math.prod(shape)
        if self._buffer is None or len(self._buffer) < n:
            self._buffer = None
            self._buffer = np.empty(n, np.uint8)
        return self._buffer[:n].reshape(shape)

    def _fill(self, info: TensorInfo, out: np.ndarray, offset: int) -> None:
        fd = self._files.get(info.part)
        if fd is None:
            fd = self._files[info.part] = os.open(self._paths[info.part], os.O_RDONLY)
        view, done = memoryview(out.data), 0
        while done < len(view):
            n = os.preadv(fd, [view[done : done + _READ_BYTES]], offset + done)
            if n == 0:
                raise GGUFError(f"{self._paths[info.part]}: the file ends inside {info.name}; copy it again")
            done += n
            self.bytes_read += n
            self._progress(n)


def check_types(tensors: Iterable[TensorInfo], backend: Backend) -> None:
    """Make sure that the backend can compute with every tensor.

    Raises:
        ModelError: names a tensor whose type it cannot.
    """
    for info in tensors:
        if not backend.supports(info.type):
            raise ModelError(
                f"tensor {info.name} has type {info.type.name}, which the {backend.name} backend cannot compute yet"
            )


def load_weights(
    paths: Iterable[str],
    tensors: Mapping[str, TensorInfo],
    sharding: Sharding,
    rank: int,
    backend: Backend,
    progress: Callable[[int], None] = lambda n: None,
) -> tuple[Weights, int]:
    """Read a rank's slices and hand them to its backend; returns the weights and the number of bytes read.

    Tensors that lie in the same place (a tied head) are read and kept once.
    """
    matrices: dict[str, Weight] = {}
    vectors: dict[str, Value] = {}
    by_place: dict[tuple[int, int], Weight] = {}
    with SliceReader(paths, progress) as reader:
        for info in filter(sharding.holds, tensors.values()):
            place = sharding.placement(info)
            is_matrix = info.name.endswith(".weight") and len(info.shape) > 1
            known = by_place.get((info.part, info.offset))
            if is_matrix and known is not None:
                matrices[info.name] = known
                continue
            part = sharding.slice_of(info, rank)
            # A backend that copies has the attribute ``copies``.
            data = reader.read(info, part, borrowed=is_matrix and getattr(backend, "copies", False))
            raw = RawWeight(info.name, info.type, data, part.n_in, part.pad)
            if is_matrix:
                weight = Weight(info.name, backend.weight(raw), place.axis, place.cut)
                matrices[info.name] = by_place[info.part, info.offset] = weight
            else:
                rows = backend.vector(raw)
                vector = rows if len(info.shape) > 1 else rows[0]
                vectors[info.name] = Value(vector, place.layout)
        return Weights(matrices, vectors), reader.bytes_read
