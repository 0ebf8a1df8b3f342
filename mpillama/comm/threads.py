"""Ranks as threads of one process, so that tests run any number of ranks without MPI."""

from __future__ import annotations

import pickle
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mpillama.comm.board import Board
from mpillama.comm.watch import Watch
from mpillama.errors import JobError
from mpillama.layout import Cut

T = TypeVar("T")
# How often one who waits looks whether another has failed, seconds.
_GLANCE = 0.1


class _Board:
    """What the threads share: a slot for each rank, and a barrier that breaks when one of them fails."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.counts = [0] * size
        self.failed = False
        self.memory = bytearray(Board.nbytes(size))
        self.slots: list[Any] = [None] * size
        self.barrier = threading.Barrier(size, timeout=timeout)
        self.messages = [queue.Queue[np.ndarray]() for _ in range(size)]
        self.mail = [queue.Queue[tuple[int, bytes]]() for _ in range(size)]
        self.progress: queue.Queue[int] = queue.Queue()
        # Room for one: a sender runs ahead by no more.
        self.channels: defaultdict[tuple[int, int], queue.Queue[np.ndarray]] = defaultdict(lambda: queue.Queue(1))
        self.parcels: defaultdict[tuple[int, int], queue.Queue[np.ndarray]] = defaultdict(queue.Queue)
        self.lock = threading.Lock()
        self._parts: dict[tuple[int, ...], _Board] = {}

    def part(self, ranks: tuple[int, ...]) -> _Board:
        """Return the board of some of the threads."""
        with self.lock:
            if ranks not in self._parts:
                self._parts[ranks] = _Board(len(ranks), self.timeout)
            if self.barrier.broken:
                self._parts[ranks].abort()
            return self._parts[ranks]

    def channel(self, source: int, target: int) -> queue.Queue[np.ndarray]:
        """Return the queue of what one thread sends to another."""
        with self.lock:
            return self.channels[source, target]

    def parcel(self, source: int, target: int) -> queue.Queue[np.ndarray]:
        """Return the queue of the bytes that one thread sends to another."""
        with self.lock:
            return self.parcels[source, target]

    def abort(self) -> None:
        """Let no rank wait for one that has failed, here or on the board of a part."""
        self.failed = True
        self.barrier.abort()
        with self.lock:
            for part in self._parts.values():
                part.abort()

    def take(self, box: queue.Queue[np.ndarray]) -> np.ndarray:
        """Return the next item of a queue.

        Raises:
            threading.BrokenBarrierError: another thread has failed, or nothing has come in time.
        """
        return self._patiently(lambda: box.get(timeout=_GLANCE))

    def put(self, box: queue.Queue[np.ndarray], x: np.ndarray) -> None:
        """Add to a queue that has room for it, at some time; raises as `take` does."""
        self._patiently(lambda: box.put(x, timeout=_GLANCE))

    def _patiently(self, attempt: Callable[[], T]) -> T:
        for _ in range(max(1, int(self.timeout / _GLANCE))):
            try:
                return attempt()
            except (queue.Empty, queue.Full):
                if self.barrier.broken:
                    break
        raise threading.BrokenBarrierError

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self.slots[rank] = value
        self.wait(rank)
        values = list(self.slots)
        self.wait(rank)
        return values

    def wait(self, rank: int) -> None:
        """Wait for all ranks.

        Raises:
            JobError: some have not come in time.
            BrokenBarrierError: another rank has failed.
        """
        self.counts[rank] += 1
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            if self.failed:
                raise
            late = [f"rank {r}" for r, n in enumerate(self.counts) if n < self.counts[rank]]
            raise JobError(f"{', '.join(late)} has not come within {self.timeout:g} s") from None


class ThreadGroup:
    """A group whose ranks are threads; sums in rank order, so every rank gets the same bits."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board, self.rank, self.size = board, rank, board.size

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks."""
        values = self._board.exchange(self.rank, x)
        total = values[0].copy()
        for value in values[1:]:
            total += value
        # A rank may overwrite its ``x`` only after all have read it.
        self._board.wait(self.rank)
        return total

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        joined = np.concatenate(self._board.exchange(self.rank, x), axis=-1)
        self._board.wait(self.rank)
        return joined


class ThreadArrival:
    """The next array of a channel."""

    def __init__(self, board: _Board, box: queue.Queue[np.ndarray], shape: tuple[int, ...]) -> None:
        self._board, self._box, self._shape = board, box, shape

    def wait(self) -> np.ndarray:
        """Return it."""
        x = self._board.take(self._box)
        if x.shape != self._shape:
            raise AssertionError(f"expected an array of shape {self._shape}, got {x.shape}")
        return x


class ThreadLink:
    """Two queues between two threads."""

    def __init__(self, board: _Board, rank: int, partner: int) -> None:
        self._board = board
        self._out, self._in = board.channel(rank, partner), board.channel(partner, rank)

    def send(self, x: np.ndarray) -> None:
        """Put the array into the partner's queue, once the one before is taken."""
        self._board.put(self._out, x)

    def expect(self, shape: tuple[int, ...]) -> ThreadArrival:
        """Return the place of the next array."""
        return ThreadArrival(self._board, self._in, shape)

    def receive(self, shape: tuple[int, ...]) -> np.ndarray:
        """Wait for the next array."""
        return self.expect(shape).wait()


class ThreadCourier:
    """Queues between all threads."""

    def __init__(self, board: _Board, rank: int) -> None:
        self._board, self._rank = board, rank

    def send(self, rank: int, data: np.ndarray) -> None:
        """Put a copy into the queue."""
        self._board.parcel(self._rank, rank).put(data.copy())

    def flush(self) -> None:
        """Nothing is kept back."""

    def receive(self, rank: int, out: np.ndarray) -> int:
        """Take the next message."""
        data = self._board.take(self._board.parcel(rank, self._rank))
        out[: len(data)] = data
        return len(data)

    def progress(self) -> None:
        """Nothing is on its way.

        Raises:
            threading.BrokenBarrierError: another thread has failed.
        """
        if self._board.barrier.broken:
            raise threading.BrokenBarrierError

    def close(self) -> None:
        """Nothing is held."""


class ThreadWorld:
    """A run whose ranks are threads."""

    def __init__(self, board: _Board, rank: int, job_ranks: Sequence[int] = ()) -> None:
        self._board, self.rank, self.size = board, rank, board.size
        self.job_ranks = tuple(job_ranks) or tuple(range(board.size))
        self.hosts = ("threads",) * board.size
        self.local_rank, self.local_size = rank, board.size
        own = Board(board.memory, None, rank, board.size)
        self.watch = Watch(range(board.size), self.hosts, own, board.timeout)

    def group(self, ranks: Sequence[int] | None = None) -> ThreadGroup:
        """Return the group of all threads, or of some."""
        if ranks is None or len(ranks) == self.size:
            return ThreadGroup(self._board, self.rank)
        return ThreadGroup(self._board.part(tuple(ranks)), ranks.index(self.rank))

    def link(self, partner: int) -> ThreadLink:
        """Return the channel to another thread."""
        return ThreadLink(self._board, self.rank, partner)

    def courier(self) -> ThreadCourier:
        """Return queues between all threads."""
        return ThreadCourier(self._board, self.rank)

    def bcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        return self._board.exchange(self.rank, value)[0]

    def gather(self, value: Any) -> list[Any]:
        """Return all values on rank 0."""
        values = self._board.exchange(self.rank, value)
        return values if self.rank == 0 else []

    def agree(self, signature: int) -> list[int]:
        """Return the signatures of all ranks."""
        return self._board.exchange(self.rank, signature)

    def send(self, message: np.ndarray) -> None:
        """Put a message into every other rank's queue."""
        for box in self._board.messages[1:]:
            box.put(message.copy())

    def receive(self) -> np.ndarray:
        """Take the next message."""
        return self._board.take(self._board.messages[self.rank])

    def part(self, ranks: Sequence[int]) -> ThreadWorld:
        """Return the world of some of the threads."""
        if len(ranks) == self.size:
            return self
        return ThreadWorld(self._board.part(tuple(ranks)), ranks.index(self.rank), ranks)

    def post(self, rank: int, value: Any) -> None:
        """Put an object into another rank's queue, pickled as for another process."""
        self._board.mail[rank].put((self.rank, pickle.dumps(value)))

    def fetch(self, seconds: float = 0.0) -> list[tuple[int, Any]]:
        """Take what is in this rank's queue."""
        box, end = self._board.mail[self.rank], time.monotonic() + seconds
        while box.empty() and time.monotonic() < end:
            if self._board.barrier.broken:
                raise threading.BrokenBarrierError
            time.sleep(1e-3)
        return [(source, pickle.loads(value)) for source, value in (box.get() for _ in range(box.qsize()))]

    def report(self, amount: int) -> None:
        """Note some progress."""
        if self.rank:
            self._board.progress.put(amount)

    def reported(self) -> int:
        """Return the progress noted since the last call."""
        total = 0
        while not self._board.progress.empty():
            total += self._board.progress.get()
        return total

    def abort(self, exit_code: int) -> None:
        """Break the barrier, so that no thread waits for this one."""
        self._board.abort()

    def close(self) -> None:
        """Nothing is held."""


def run_threads(size: int, main: Callable[[ThreadWorld], T], timeout: float = 60.0) -> list[T]:
    """Run ``main`` once for each rank, in threads, and return their results in rank order.

    Raises:
        Exception: the first failure of a rank that is not merely the consequence of another's.
    """
    board = _Board(size, timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def body(rank: int) -> None:
        try:
            results[rank] = main(ThreadWorld(board, rank))
        except BaseException as error:
            errors.append(error)
            board.abort()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return results
