"""Slices of files as weights: a rank takes the bytes that it owns, in the order of the file, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Protocol

import numpy as np

from mpillama.backends.base import Backend, RawWeight
from mpillama.errors import ModelError
from mpillama.gguf.reader import TensorInfo
from mpillama.models.weights import Weights
from mpillama.ops import Value, Weight
from mpillama.reading import Files, ReadWatch
from mpillama.sharding import Sharding, Slice


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

    def read(self, info: TensorInfo, part: Slice, borrowed: bool = False) -> np.ndarray:
        """Return a slice of a tensor, uint8 (n_mats, n_rows, row bytes); one that is ``borrowed`` until the next call.

        Raises:
            GGUFError: the file cannot be read, or has become shorter.
            PeerFailure: another rank cannot go on.
        """
        ...


class Shelf:
    """Memory for slices: new, or the same again for those that are borrowed."""

    def __init__(self) -> None:
        self._buffer: np.ndarray | None = None

    def array(self, part: Slice, borrowed: bool) -> np.ndarray:
        """Return memory for a slice, uint8 (n_mats, n_rows, row bytes)."""
        shape = part.n_mats, part.row_stop - part.row_start, part.col_stop - part.col_start
        # Memory that is new to the process costs as much time as reading into it.
        if not borrowed:
            return np.empty(shape, np.uint8)
        n = math.prod(shape)
        if self._buffer is None or len(self._buffer) < n:
            self._buffer = None
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

    def read(self, info: TensorInfo, part: Slice, borrowed: bool = False) -> np.ndarray:
        """Return a slice of a tensor, see `Source`."""
        out = self._shelf.array(part, borrowed)
        if out.size == 0:
            return out
        _, n_rows, n_cols = out.shape
        mat_bytes = info.nbytes // (info.shape[2] if len(info.shape) > 2 else 1)
        stride = mat_bytes // (info.shape[1] if len(info.shape) > 1 else 1)
        first = info.offset + part.mat_start * mat_bytes
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
        return out

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
            # A backend that copies has the attribute ``copies``.
            data = source.read(info, part, borrowed=is_matrix(info) and getattr(backend, "copies", False))
            raw = RawWeight(info.name, info.type, data, part.n_in, part.pad)
            if is_matrix(info):
                weight = Weight(info.name, backend.weight(raw), place.axis, place.cut)
                matrices.update((other.name, weight) for other in held)
            else:
                rows = backend.vector(raw)
                vectors[info.name] = Value(rows if len(info.shape) > 1 else rows[0], place.layout)
    return Weights(matrices, vectors)
