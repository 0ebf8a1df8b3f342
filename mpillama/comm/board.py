"""What the ranks of one host can see of each other without asking: who lives, who runs, and where each one is."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

BEAT = 0.25
"""Seconds between two beats of a rank's heart."""

# A row of uint64 for each rank, a pair of cache lines long, and one more row for the heart of the run's rank 0.
_ROW = 16
_BEATS, _STEP, _CALL, _KIND, _TICKS = range(5)
# struct flock of Linux: l_type, l_whence, l_start, l_len, l_pid.
_FLOCK = "hhqqi4x"


class Local(Protocol):
    """What is needed of a communicator of the ranks of one host (mpi4py's has it)."""

    rank: int
    size: int

    def bcast(self, value: Any) -> Any:
        """Return rank 0's value."""
        ...

    def allgather(self, value: Any) -> list[Any]:
        """Return all values."""
        ...


def share_file(local: Local, nbytes: int) -> int | None:
    """Return a file descriptor of ``nbytes`` zero bytes that the ranks of one host share, or None if they cannot.

    The file has no name by then, so that nothing is left behind however the job ends.
    """
    path, fd = "", None
    if local.rank == 0:
        folder = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        try:
            fd, path = tempfile.mkstemp(prefix="mpillama-", dir=folder)
            # Not merely its size: a full memory file system would else end the process when it writes.
            os.posix_fallocate(fd, 0, nbytes)
            identity = os.fstat(fd)
        except OSError:
            fd, identity = None, None
        local.bcast((path, identity and (identity.st_dev, identity.st_ino, os.uname().nodename)))
    else:
        path, expected = local.bcast(None)
        try:
            fd = os.open(path, os.O_RDWR) if expected else None
        except OSError:
            fd = None
        if fd is not None and (os.fstat(fd).st_ino, os.fstat(fd).st_size) != (expected[1], nbytes):
            os.close(fd)
            fd = None
    everyone = all(local.allgather(fd is not None))
    if path and local.rank == 0:
        os.unlink(path)
    if not everyone and fd is not None:
        os.close(fd)
    return fd if everyone else None


class Board:
    """One rank's view of the board of its host.

    Args:
        memory: `nbytes` zero bytes that the ranks share.
        fd: of the file that ``memory`` maps, made by `share_file`; None if the ranks are not processes of their own.
        rank: on this host.
        size: ranks on this host.
    """

    def __init__(self, memory: mmap.mmap | bytearray, fd: int | None, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._fd = fd
        self._cells = memoryview(memory).cast("Q")
        self._mine = rank * _ROW
        self._stop = threading.Event()
        self._heart: threading.Thread | None = None
        if fd is not None:
            # The system drops the lock when the process ends, however it ends, and whoever reaps it.
            fcntl.lockf(fd, fcntl.LOCK_EX, 1, rank)

    @staticmethod
    def nbytes(size: int) -> int:
        """Return the size of the file of a board."""
        return (size + 1) * _ROW * 8

    def start_heart(self, also: Callable[[], None] | None = None) -> None:
        """Beat from now on, as long as the process runs; ``also`` is called with each beat."""

        def beat() -> None:
            while not self._stop.wait(BEAT):
                self._cells[self._mine + _BEATS] += 1
                if also is not None:
                    also()

        self._heart = threading.Thread(target=beat, daemon=True, name="heart")
        self._heart.start()

    def stop_heart(self) -> None:
        """Stop beating, before MPI is finalized."""
        self._stop.set()
        if self._heart is not None:
            self._heart.join()

    def note(self, step: int, call: int, kind: int) -> None:
        """Write down where this rank is."""
        cells, mine = self._cells, self._mine
        cells[mine + _STEP], cells[mine + _CALL], cells[mine + _KIND] = step, call, kind

    @property
    def place(self) -> np.ndarray:
        """What `note` writes, uint64 (3,), for native code that does so itself."""
        return np.frombuffer(self._cells, np.uint64)[self._mine + _STEP : self._mine + _KIND + 1]

    def tick(self) -> None:
        """Let the others know that this rank is waiting."""
        self._cells[self._mine + _TICKS] += 1

    def root_beat(self, beats: int) -> None:
        """Pass on how often the heart of the run's rank 0, which is on another host, has beaten."""
        self._cells[self.size * _ROW + _BEATS] = beats

    def beats(self) -> list[int]:
        """Return how often each heart has beaten; the last is that of the run's rank 0, if it is on another host."""
        return self._cells[_BEATS::_ROW].tolist()

    def ticks(self, rank: int) -> int:
        """Return a number that changes as long as a rank waits for others."""
        return self._cells[rank * _ROW + _TICKS]

    def where(self, rank: int) -> tuple[int, int, int]:
        """Return the step, the call and its kind that a rank has last begun."""
        at = rank * _ROW
        return self._cells[at + _STEP], self._cells[at + _CALL], self._cells[at + _KIND]

    def dead(self, ranks: Sequence[int]) -> list[int]:
        """Return those of the ranks whose process is no more."""
        if self._fd is None:
            return []
        found = []
        for rank in ranks:
            if rank != self.rank:
                asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, rank, 1, 0)
                kind = struct.unpack(_FLOCK, fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))[0]
                if kind == fcntl.F_UNLCK:
                    found.append(rank)
        return found

    def claim(self) -> bool:
        """Return whether this rank is the first of its host to ask: the one that says what is wrong."""
        if self._fd is None:
            return True
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self.size)
        except OSError:
            return False
        return True
