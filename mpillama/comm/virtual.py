"""More ranks than processes: what is computed depends on their number, and not on that of the processes.

Each process runs several virtual ranks, each in a thread of its own and with a slice of its own. Their partial sums are
not added up within a process but all together, in the order of virtual ranks; so the same numbers come out on however
many processes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mpillama.comm.base import Group
from mpillama.layout import Cut

VIRTUAL_RANKS = 12
"""Virtual ranks of a run: as many for each of 1, 2, 3, 4, 6 or 12 processes of equal shares."""


class Crew:
    """The virtual ranks of one process.

    Args:
        real: the group of the processes.
        counts: virtual ranks of each process, at least one.
    """

    def __init__(self, real: Group, counts: Sequence[int]) -> None:
        self.real, self.counts = real, tuple(counts)
        self.first, self.n_local = sum(counts[: real.rank]), counts[real.rank]
        self.size = sum(counts)
        self.barrier = threading.Barrier(self.n_local)
        self._slots: list[Any] = [None] * self.n_local
        self._result: np.ndarray | None = None

    def groups(self) -> list[VirtualGroup]:
        """Return the groups of this process's virtual ranks; the first belongs into the thread that calls MPI."""
        return [VirtualGroup(self, i) for i in range(self.n_local)]

    def gather(self, place: int, x: np.ndarray, sizes: Sequence[int], join: Any) -> np.ndarray:
        """Give ``join`` the flat arrays of all virtual ranks, which have these sizes; return a copy of its result."""
        self._slots[place] = x
        self.barrier.wait()
        if place == 0:
            mine = np.concatenate([np.ravel(slot) for slot in self._slots])
            ends = np.cumsum([0, *self.counts])
            edges = np.cumsum([0, *sizes])
            ranges = tuple((int(edges[a]), int(edges[b])) for a, b in pairwise(ends))
            everything = self.real.allgather(mine[None], Cut(int(edges[-1]), ranges))[0]
            self._result = join(np.split(everything, edges[1:-1]))
        self.barrier.wait()
        assert self._result is not None
        return self._result.copy()


class VirtualGroup:
    """The group of all virtual ranks, as one of them sees it."""

    def __init__(self, crew: Crew, place: int) -> None:
        self._crew, self._place = crew, place
        self.rank, self.size = crew.first + place, crew.size

    @property
    def leader(self) -> bool:
        """Whether this is virtual rank 0."""
        return self.rank == 0

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the virtual ranks, added up in their order."""

        def add(parts: list[np.ndarray]) -> np.ndarray:
            total = parts[0].copy()
            for part in parts[1:]:
                total += part
            return total.reshape(x.shape)

        return self._crew.gather(self._place, x, [x.size] * self.size, add)

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        lead = x.shape[:-1]
        n_rows = int(np.prod(lead, dtype=np.int64))
        widths = [cut.width(rank) for rank in range(self.size)]

        def join(parts: list[np.ndarray]) -> np.ndarray:
            return np.concatenate([p.reshape(*lead, w) for p, w in zip(parts, widths, strict=True)], axis=-1)

        return self._crew.gather(self._place, x, [n_rows * width for width in widths], join)
