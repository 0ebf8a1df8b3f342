"""Slices of files, each byte of which leaves the file system once: ranks read in turn, and hand each rank its slices.

The files are read from end to end in chunks of whole rows, chunk by chunk by another rank, on another host where there
are several. A rank reads its next chunk while it hands on the one before. All ranks go through the chunks in the same
order, so that nobody waits for one that waits for him: whoever is farthest behind waits at most for a read.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpillama.comm.base import World
from mpillama.errors import PeerFailure, UserError
from mpillama.gguf.reader import TensorInfo
from mpillama.loader import Shelf, distinct
from mpillama.partition import Partition
from mpillama.reading import Files, ReadWatch
from mpillama.sharding import Slice

CHUNK = 16 << 20
"""Bytes that a rank reads at once, and hands on; it holds two of them."""
READERS_PER_HOST = 4
"""Ranks of a host that read."""
# Tensors lie at aligned places: gaps of this size are read along.
_GAP = 64 << 10
# Seconds between two looks at the other ranks while a read is waited for.
_GLANCE = 0.005


@dataclass(frozen=True)
class Piece:
    """Rows [first, stop) of a tensor, counted through all of its matrices.

    Attributes:
        infos: the tensors of this place: more than one for matrices that are tied.
        row_bytes: of the tensor in the file.
        start: of the first row within its chunk, in bytes.
    """

    infos: tuple[TensorInfo, ...]
    first: int
    stop: int
    row_bytes: int
    start: int


@dataclass(frozen=True)
class Chunk:
    """So many bytes of a file, and the pieces in them."""

    part: int
    offset: int
    n_bytes: int
    pieces: tuple[Piece, ...]


def cut_chunks(tensors: Iterable[TensorInfo], chunk_bytes: int) -> list[Chunk]:
    """Return the chunks of all tensors, which come in the order of the files."""
    chunks: list[Chunk] = []
    part, offset, end = -1, 0, 0
    pieces: list[Piece] = []

    def close() -> None:
        if pieces:
            chunks.append(Chunk(part, offset, end - offset, tuple(pieces)))
            pieces.clear()

    for infos in distinct(tensors):
        info = infos[0]
        n_rows = _n_rows(info) * (info.shape[2] if len(info.shape) > 2 else 1)
        row_bytes = info.nbytes // n_rows
        step = max(1, chunk_bytes // row_bytes)
        for first in range(0, n_rows, step):
            stop = min(n_rows, first + step)
            start, after = info.offset + first * row_bytes, info.offset + stop * row_bytes
            if info.part != part or start > end + _GAP or max(end, after) - offset > chunk_bytes:
                close()
                part, offset, end = info.part, start, start
            pieces.append(Piece(tuple(infos), first, stop, row_bytes, start - offset))
            end = max(end, after)
    close()
    return chunks


def reading_ranks(hosts: Sequence[str], per_host: int) -> list[int]:
    """Return the ranks that read, in turn: the first of each host, then the second of each, and so on."""
    by_host: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        by_host.setdefault(host, []).append(rank)
    return [ranks[i] for i in range(per_host) for ranks in by_host.values() if i < len(ranks)]


def rows_before(info: TensorInfo, part: Slice, row: int) -> int:
    """Return how many rows of a slice come before a row of its tensor; rows count through all matrices."""
    per_mat, n = _n_rows(info), part.n_rows
    mat, rest = divmod(row, per_mat)
    mat -= part.mat_start
    if mat < 0:
        return 0
    if mat >= part.n_mats:
        return part.n_mats * n
    return mat * n + min(max(rest - part.row_start, 0), n)


def take_rows(piece: Piece, part: Slice, data: np.ndarray) -> np.ndarray:
    """Return what a slice has of a piece, flat; a view of the chunk's bytes where they lie together."""
    info = piece.infos[0]
    n_bytes = (piece.stop - piece.first) * piece.row_bytes
    rows = data[piece.start : piece.start + n_bytes].reshape(-1, piece.row_bytes)
    per_mat, found = _n_rows(info), []
    for mat in range(piece.first // per_mat, -(-piece.stop // per_mat)):
        if part.mat_start <= mat < part.mat_start + part.n_mats:
            first = max(mat * per_mat + part.row_start, piece.first) - piece.first
            stop = min(mat * per_mat + part.row_stop, piece.stop) - piece.first
            if first < stop:
                found.append(rows[first:stop, part.col_start : part.col_stop])
    if len(found) == 1:
        return np.ascontiguousarray(found[0]).reshape(-1)
    return np.concatenate([x.reshape(-1) for x in found]) if found else rows[:0].reshape(-1)


def _n_rows(info: TensorInfo) -> int:
    return info.shape[1] if len(info.shape) > 1 else 1


class _ReadAhead:
    """A thread that reads this rank's chunks, one ahead of the one that is in use, and closes the files."""

    def __init__(self, files: Files, chunks: Sequence[Chunk]) -> None:
        self._files, self._chunks, self._ended = files, chunks, False
        self._free: queue.Queue[np.ndarray | None] = queue.Queue()
        self._ready: queue.Queue[np.ndarray | UserError] = queue.Queue()
        size = max((chunk.n_bytes for chunk in chunks), default=0)
        for _ in range(2):
            self._free.put(np.empty(size, np.uint8))
        if chunks:
            threading.Thread(target=self._read, name="read-ahead", daemon=True).start()

    def _read(self) -> None:
        try:
            for chunk in self._chunks:
                buffer = self._free.get()
                if buffer is None or self._ended:
                    return
                self._files.fill(chunk.part, chunk.offset, buffer[: chunk.n_bytes], chunk.pieces[0].infos[0].name)
                self._ready.put(buffer)
        except UserError as error:
            self._ready.put(error)
        finally:
            self._files.close()

    def take(self, meanwhile: Callable[[], None]) -> np.ndarray | UserError:
        """Return the next chunk, or why there is none; ``meanwhile`` is called every now and then."""
        while True:
            try:
                return self._ready.get(timeout=_GLANCE)
            except queue.Empty:
                meanwhile()

    def give_back(self, buffer: np.ndarray) -> None:
        """Let a buffer be used again."""
        self._free.put(buffer)

    def close(self) -> None:
        """Let the thread end; a read of its that hangs is not waited for."""
        self._ended = True
        self._free.put(None)


class Relay:
    """This rank's part in reading together; all ranks make one at the same time and take what their slices are.

    A rank that cannot go on still walks through all chunks, reading nothing and sending empty messages; whoever gets
    one does the same. So all of them end soon, and `mpillama.comm.base.settle` says why.

    Args:
        world: all ranks.
        paths: of the files.
        tensors: of the model, in the order of the files.
        partition: over all ranks.
        progress: called with each number of bytes of this rank's slices.
        watch: over the reads.
        chunk_bytes: see `CHUNK`.
    """

    def __init__(
        self,
        world: World,
        paths: Iterable[str],
        tensors: Iterable[TensorInfo],
        partition: Partition,
        progress: Callable[[int], None],
        watch: ReadWatch | None = None,
        chunk_bytes: int = CHUNK,
    ) -> None:
        self._world, self._partition, self._progress = world, partition, progress
        self._courier = world.courier()
        self._files, self._shelf = Files(paths, watch), Shelf()
        chunks = cut_chunks(tensors, chunk_bytes)
        readers = reading_ranks(world.hosts, READERS_PER_HOST)
        self._pieces = [
            (chunk, readers[i % len(readers)], piece) for i, chunk in enumerate(chunks) for piece in chunk.pieces
        ]
        self._last = {info.name: i for i, (_, _, piece) in enumerate(self._pieces) for info in piece.infos}
        self._at = 0
        mine = chunks[readers.index(world.rank) :: len(readers)] if world.rank in readers else []
        self._ahead = _ReadAhead(self._files, mine)
        self._chunk: Chunk | None = None
        self._data: np.ndarray | None = None
        self._failure: UserError | None = None

    @property
    def bytes_read(self) -> int:
        """Bytes that this rank has read from files so far."""
        return self._files.bytes_read

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if kind is None or isinstance(error, UserError):
            # Others may count on this rank's reads, whatever has become of its own weights.
            self._failure = self._failure or (error if isinstance(error, UserError) else None)
            self._walk(len(self._pieces))
            self._courier.close()
            self._ahead.close()
            if kind is None and self._failure is not None:
                raise self._failure

    def read(self, info: TensorInfo, part: Slice) -> np.ndarray:
        """Return a slice of a tensor, see `mpillama.loader.Source`; slices are taken in the order of the files."""
        return self._take(info, part, np.empty((part.n_mats, part.n_rows, part.row_bytes), np.uint8))

    def pieces(self, info: TensorInfo, part: Slice) -> Iterator[tuple[int, np.ndarray]]:
        """Yield a slice, as `read` returns it, in one piece."""
        out = self._take(info, part, self._shelf.array(part.n_mats * part.n_rows, part.row_bytes))
        if out.size:
            yield 0, out

    def _take(self, info: TensorInfo, part: Slice, out: np.ndarray) -> np.ndarray:
        self._walk(self._last[info.name] + 1, info, part, out.reshape(-1))
        if self._failure is not None:
            raise self._failure
        return out

    def _walk(
        self, stop: int, info: TensorInfo | None = None, part: Slice | None = None, out: np.ndarray | None = None
    ) -> None:
        """Go on to a piece, and fill a slice with what the pieces of its tensor have of it."""
        while self._at < stop:
            chunk, reader, piece = self._pieces[self._at]
            self._at += 1
            if reader == self._world.rank and chunk is not self._chunk:
                self._hand_out(chunk)
            own = self._own_slice(piece)
            if own is None:
                continue
            width = own.row_bytes
            a, b = (rows_before(piece.infos[0], own, row) * width for row in (piece.first, piece.stop))
            if a == b:
                continue
            # Where this rank gives up, what is still sent to it has to go somewhere.
            wanted = info is not None and part is not None and info in piece.infos
            into = out[a:b] if out is not None and wanted else np.empty(b - a, np.uint8)
            if reader != self._world.rank:
                if self._courier.receive(reader, into) != b - a:
                    self._failure = self._failure or PeerFailure()
                    continue
            elif self._data is not None:
                into[:] = take_rows(piece, own, self._data)
            self._progress(b - a)

    def _own_slice(self, piece: Piece) -> Slice | None:
        sharding, index = self._partition.of(self._world.rank)
        held = next((info for info in piece.infos if sharding.holds(info)), None)
        return sharding.slice_of(held, index) if held else None

    def _hand_out(self, chunk: Chunk) -> None:
        """Take a chunk of this rank's and begin to send each rank its slices of it, when the one before is gone."""
        self._courier.flush()
        if self._data is not None:
            self._ahead.give_back(self._data)
        self._chunk, self._data = chunk, None
        if self._failure is None:
            data = self._ahead.take(self._courier.progress)
            if isinstance(data, UserError):
                self._failure = data
            else:
                self._data = data
        for piece in chunk.pieces:
            self._send(piece)

    def _send(self, piece: Piece) -> None:
        packed: dict[Slice, np.ndarray] = {}
        nothing = np.empty(0, np.uint8)
        for rank in range(self._world.size):
            if rank == self._world.rank:
                continue
            sharding, index = self._partition.of(rank)
            held = next((info for info in piece.infos if sharding.holds(info)), None)
            if held is None:
                continue
            part = sharding.slice_of(held, index)
            n = rows_before(held, part, piece.stop) - rows_before(held, part, piece.first)
            if n * part.row_bytes == 0:
                continue
            if self._data is not None and part not in packed:
                packed[part] = take_rows(piece, part, self._data)
            self._courier.send(rank, packed.get(part, nothing))
