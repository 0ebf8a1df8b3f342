"""Slices of files as weights: a rank takes the bytes that it owns, in the order of the file, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Protocol

import numpy as np

from mpillama.backends.base import ROW_UNIT, Backend, Filling, Handle, RawWeight
from mpillama.errors import ModelError
from mpillama.gguf.reader import TensorInfo
from mpillama.models.weights import Weights
from mpillama.reading import Files, ReadWatch
from mpillama.sharding import Sharding, Slice
from mpillama.values import Value, Weight

PIECE = 1 << 20
"""Bytes of a matrix that are read before they are laid out: they stay in a core's cache meanwhile."""


class Source(Protocol):
    """Where slices come from; a context, left when all have been taken."""

    @property
    def bytes_read(self) -> int:
        """Bytes that this rank has read from files so far."""
        ...

    def __enter__(self) -> Source: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...

    def read(self, info: TensorInfo, part: Slice) -> np.ndarray:
        """Return a slice of a tensor, uint8 (n_mats, n_rows, row bytes).

        Raises:
            GGUFError: the file cannot be read, or has become shorter.
            PeerFailure: another rank cannot go on.
        """
        ...

    def pieces(self, info: TensorInfo, part: Slice) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a slice in pieces as `Filling` backends take them: the number of the first row, and rows.

        Their memory, uint8 (n, row bytes), is used again for the next. Raises as `read` does.
        """
        ...


class Shelf:
    """Memory that is used again and again: such as is new to the process costs as much time as reading into it."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def array(self, *shape: int) -> np.ndarray:
        """Return uint8 of this shape, in the place of those before."""
        n = math.prod(shape)
        if len(self._buffer) < n:
            self._buffer = np.empty(0, np.uint8)
            self._buffer = np.empty(n, np.uint8)
        return self._buffer[:n].reshape(shape)


class SliceReader:
    """Reads slices of tensors from a model's files.

    Args:
        paths: of the files.
        progress: called with each number of bytes.
        watch: over the reads.
    """

    def __init__(self, paths: Iterable[str], progress: Callable[[int], None], watch: ReadWatch | None = None) -> None:
        self._files, self._progress, self._shelf = Files(paths, watch), progress, Shelf()

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        return self._files.bytes_read

    def __enter__(self) -> SliceReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def read(self, info: TensorInfo, part: Slice) -> np.ndarray:
        """Return a slice of a tensor, see `Source`."""
        out = np.empty((part.n_mats, part.n_rows, part.row_bytes), np.uint8)
        for mat in range(part.n_mats if out.size else 0):
            self._read_rows(info, part, mat, 0, out[mat])
        return out

    def pieces(self, info: TensorInfo, part: Slice) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a slice in pieces, see `Source`."""
        if not part.n_rows * part.row_bytes:
            return
        step = max(1, PIECE // (part.row_bytes * ROW_UNIT)) * ROW_UNIT
        for mat in range(part.n_mats):
            for row in range(0, part.n_rows, step):
                rows = self._shelf.array(min(step, part.n_rows - row), part.row_bytes)
                self._read_rows(info, part, mat, row, rows)
                yield mat * part.n_rows + row, rows

    def _read_rows(self, info: TensorInfo, part: Slice, mat: int, row: int, out: np.ndarray) -> None:
        """Fill uint8 (n, row bytes) with rows of a matrix of the slice, from its row ``row`` on."""
        mat_bytes = info.nbytes // (info.shape[2] if len(info.shape) > 2 else 1)
        stride = mat_bytes // (info.shape[1] if len(info.shape) > 1 else 1)
        start = info.offset + (part.mat_start + mat) * mat_bytes + (part.row_start + row) * stride + part.col_start
        if part.row_bytes == stride:
            self._fill(info, out.reshape(-1), start)
        else:
            for i in range(len(out)):
                self._fill(info, out[i], start + i * stride)

    def _fill(self, info: TensorInfo, out: np.ndarray, offset: int) -> None:
        self._files.fill(info.part, offset, out, info.name, self._progress)


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


def is_matrix(info: TensorInfo) -> bool:
    """Whether a tensor is a matrix, or a stack of them: what products are made with, and what can be tied."""
    return info.name.endswith(".weight") and len(info.shape) > 1


def distinct(tensors: Iterable[TensorInfo]) -> Iterator[list[TensorInfo]]:
    """Yield the tensors in their order; matrices that lie in the same place (a tied head) together."""
    places: dict[tuple[int, int] | str, list[TensorInfo]] = {}
    for info in tensors:
        places.setdefault((info.part, info.offset) if is_matrix(info) else info.name, []).append(info)
    yield from places.values()


def load_weights(
    paths: Iterable[str],
    tensors: Mapping[str, TensorInfo],
    sharding: Sharding,
    rank: int,
    backend: Backend,
    progress: Callable[[int], None] = lambda n: None,
    watch: ReadWatch | None = None,
) -> tuple[Weights, int]:
    """Read a rank's slices and hand them to its backend; returns the weights and the number of bytes read."""
    source = SliceReader(paths, progress, watch)
    return take_weights(source, tensors, sharding, rank, backend), source.bytes_read


def take_weights(
    source: Source, tensors: Mapping[str, TensorInfo], sharding: Sharding, rank: int, backend: Backend
) -> Weights:
    """Take a rank's slices and hand them to its backend.

    Tensors that lie in the same place (a tied head) are taken and kept once.

    Args:
        source: of the slices.
        tensors: of the model, in the order of the file.
        sharding: of the rank's stage.
        rank: within the stage.
        backend: of the rank.
    """
    matrices: dict[str, Weight] = {}
    vectors: dict[str, Value] = {}
    with source:
        for infos in distinct(tensors.values()):
            held = [info for info in infos if sharding.holds(info)]
            if not held:
                continue
            info = held[0]
            place, part = sharding.placement(info), sharding.slice_of(info, rank)
            if is_matrix(info):
                weight = Weight(info.name, _take_matrix(source, info, part, backend), place.axis, place.cut)
                matrices.update((other.name, weight) for other in held)
            else:
                rows = backend.vector(RawWeight(info.name, info.type, source.read(info, part), part.n_in, part.pad))
                vectors[info.name] = Value(rows if len(info.shape) > 1 else rows[0], place.layout)
    return Weights(matrices, vectors)


def _take_matrix(source: Source, info: TensorInfo, part: Slice, backend: Backend) -> Handle:
    if not isinstance(backend, Filling):
        return backend.weight(RawWeight(info.name, info.type, source.read(info, part), part.n_in, part.pad))
    weight = backend.new_weight(info.type, part.n_mats, part.n_rows, part.n_in, part.pad)
    for first, rows in source.pieces(info, part):
        backend.fill(weight, first, rows)
    return weight
