"""Sums and joins over MPI by messages between each two ranks, so that who waits knows for whom."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from mpi4py import MPI

from mpillama.comm.watch import Watch

# One message to each of this many is faster than the rounds of a tree, as long as the messages are small.
_FEW, _SMALL = 8, 1 << 15
# Seconds: between two looks at the others, and the pauses of a rank that waits, which grow up to the longest one.
_LOOK = 0.05
_FIRST_PAUSE, BUSY, IDLE = 10e-6, 100e-6, 1e-3
_TAG = 7


def poll(
    done: Callable[[], bool], look: Callable[[], None], longest_pause: float, seconds: float = float("inf")
) -> bool:
    """Wait until something is done, with a ``look`` after the others every now and then.

    Returns:
        Whether it is done; False after so many ``seconds``.

    MPI libraries spin in their own waits, at a whole core for each rank, and wait for ever.
    """
    for _ in range(100):
        if done():
            return True
        os.sched_yield()
    pause, looked = _FIRST_PAUSE, time.monotonic()
    end = looked + seconds
    while not done():
        time.sleep(pause)
        pause = min(pause * 1.5, longest_pause)
        now = time.monotonic()
        if now > end:
            return False
        if now - looked > _LOOK:
            looked = now
            look()
    return True


class MPIExchange:
    """Ranks of a communicator.

    Args:
        comm: of these ranks, used for nothing else.
        ranks: of the run, in the order of the communicator.
        watch: over those that keep this rank waiting.
    """

    def __init__(self, comm: MPI.Comm, ranks: Sequence[int], watch: Watch) -> None:
        self._comm, self._ranks, self._watch = comm, tuple(ranks), watch
        self._me, self._size = comm.rank, comm.size
        self._peers = [(comm.rank + i) % comm.size for i in range(1, comm.size)]

    def allreduce(self, x: np.ndarray) -> None:
        """Replace ``x`` by the sum over the ranks, added up in their order."""
        if self._size == 1:
            return
        if self._size > _FEW and x.nbytes <= _SMALL:
            request = self._comm.Iallreduce(MPI.IN_PLACE, x)
            poll(request.Test, lambda: self._watch.late_elsewhere(()), BUSY)
        elif self._size == 2 or x.nbytes <= _SMALL:
            self._sum(x, [x] * self._size, x)
        else:
            edges = [x.size * i // self._size for i in range(self._size + 1)]
            parts = [x[a:b] for a, b in pairwise(edges)]
            self._sum(parts[self._me], parts, parts[self._me])
            self._swap(parts[self._me], parts)

    def _sum(self, mine: np.ndarray, parts: Sequence[np.ndarray], out: np.ndarray) -> None:
        """Send each rank its part, and sum up what all have sent of mine."""
        terms = [np.empty_like(mine) for _ in range(self._size)]
        terms[self._me] = mine
        self._transfer(terms, parts)
        total = terms[0] + terms[1]
        for term in terms[2:]:
            total += term
        out[:] = total

    def _swap(self, mine: np.ndarray, parts: Sequence[np.ndarray]) -> None:
        """Send all ranks my part, and put theirs in their places."""
        self._transfer(parts, [mine] * self._size)

    def _transfer(self, into: Sequence[np.ndarray], out: Sequence[np.ndarray]) -> None:
        comm = self._comm
        receives = [comm.Irecv(into[peer], peer, _TAG) for peer in self._peers]
        sends = [comm.Isend(out[peer], peer, _TAG) for peer in self._peers]
        requests = receives + sends

        def look() -> None:
            late = [self._ranks[peer] for peer, r in zip(self._peers, receives, strict=True) if not r.Test()]
            self._watch.late_elsewhere(late)

        poll(lambda: MPI.Request.Testall(requests), look, BUSY)

    def allgather(self, mine: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Return everyone's array, flat, with so many items each."""
        parts = [np.empty(size, mine.dtype) for size in sizes]
        parts[self._me] = np.ascontiguousarray(mine).reshape(-1)
        self._swap(parts[self._me], parts)
        return parts
