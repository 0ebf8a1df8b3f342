"""Collectives of ranks that share memory with those on the same host, and of which some may be on other hosts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mpillama.comm.watch import Watch
from mpillama.layout import Cut

if TYPE_CHECKING:
    from mpillama._shm import AllreduceCall, Segment

CAPACITY = 1 << 18
"""Bytes that a rank hands over at once; what is more goes in pieces, which stay in the second cache."""
CAPACITY_NETWORK = 1 << 20
"""The same where each piece goes over the network too."""
# Looks at a flag before a waiting rank lets others have its core: for about 0.1 ms where each rank has a core.
_SPINS, _SPINS_CROWDED = 3000, 20


def native_module_is_built() -> bool:
    """Whether the extension module of shared memory is there."""
    return find_spec("mpillama._shm") is not None


def open_segment(memory: object, rank: int, size: int, capacity: int, crowded: bool) -> Segment:
    """Return a rank's view of shared memory that is zero when the first rank comes; ``crowded``: ranks share cores."""
    from mpillama._shm import Segment

    return Segment(np.frombuffer(memory, np.uint8), rank, size, capacity, _SPINS_CROWDED if crowded else _SPINS)  # type: ignore[call-overload]


def segment_bytes(size: int, capacity: int) -> int:
    """Return the bytes of memory for so many ranks."""
    from mpillama._shm import Segment

    return Segment.bytes(size, capacity)


class Exchange(Protocol):
    """One rank of each host; these ranks carry what has to go between the hosts."""

    def allreduce(self, x: np.ndarray) -> None:
        """Replace ``x``, contiguous and flat, by its sum over the hosts, in the order of hosts."""
        ...

    def allgather(self, mine: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Return the flat arrays of all hosts, which have so many items."""
        ...


class SharedGroup:
    """Ranks of one or more hosts. Sums are added up in the order of hosts, and of ranks within a host.

    Within a host, small payloads are added up by every rank for itself, large ones in shares. Between hosts, each of
    the first `n_carriers` ranks of a host exchanges its share with its counterparts.

    Args:
        rank: in the group.
        hosts: for each host, the group's ranks there, in the order of the segment.
        segment: of this rank's host.
        exchange: with the counterparts on the other hosts; None if there is only one host, or this is no carrier.
        watch: over the ranks that keep this one waiting.
        places: of the ranks of the segment on the watch's board, in order; the same order by default.
    """

    def __init__(
        self,
        rank: int,
        hosts: Sequence[Sequence[int]],
        segment: Segment,
        exchange: Exchange | None,
        watch: Watch,
        places: Sequence[int] | None = None,
    ) -> None:
        self.rank, self.size = rank, sum(map(len, hosts))
        self._hosts = tuple(tuple(ranks) for ranks in hosts)
        self._here = next(i for i, ranks in enumerate(self._hosts) if rank in ranks)
        self._n_local = len(self._hosts[self._here])
        self.n_carriers = min(map(len, self._hosts))
        self._segment, self._exchange, self._watch = segment, exchange, watch
        self._places = tuple(range(self._n_local) if places is None else places)
        # What all read from all costs more than two rounds of shares as soon as there is much of it.
        self._direct = sys.maxsize if self._n_local <= 3 else (1 << 17) // self._n_local
        self._late: Callable[[list[int], bool], None] = self._look

    def _look(self, late: list[int], differs: bool) -> None:
        if differs:
            raise self._watch.differs(self._places[late[0]])
        self._watch.late([self._places[i] for i in late])

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks, in place where ``x`` is contiguous."""
        x = np.ascontiguousarray(x)
        if x.dtype not in (np.float32, np.float64):
            return self.allreduce(x.astype(np.float32)).astype(x.dtype)
        self._watch.begin("allreduce")
        flat = x.reshape(-1)
        if len(self._hosts) == 1:
            self._segment.allreduce(flat, self._direct, self._late)
            return x
        n = self._segment.capacity // x.itemsize
        for start in range(0, flat.size, n):
            piece = flat[start : start + n]
            share = self._segment.reduce(piece, self.n_carriers, self._late)
            if share is not None and share.size and self._exchange is not None:
                self._exchange.allreduce(share)
            self._segment.spread(piece, self.n_carriers, self._late)
        return x

    def native_allreduce(self, x: np.ndarray, counts: np.ndarray | None = None) -> AllreduceCall | None:
        """Return `allreduce` in place, for native code that makes it again and again; None where it cannot.

        Args:
            x: is replaced by its sum.
            counts: int64 (3,), to which each call adds 1, its bytes and its nanoseconds.
        """
        if len(self._hosts) > 1 or x.dtype != np.float32 or not x.flags.c_contiguous:
            return None
        from mpillama._shm import AllreduceCall

        counts = np.zeros(3, np.int64) if counts is None else counts
        place, kind = self._watch.native("allreduce")
        return AllreduceCall(self._segment, x.reshape(-1), self._direct, self._look_anew, place, kind, counts)

    def _look_anew(self, late: list[int], differs: bool, first: bool) -> None:
        if first:
            self._watch.wait_anew()
        self._look(late, differs)

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        self._watch.begin("allgather")
        lead = x.shape[:-1]
        n_rows = int(np.prod(lead, dtype=np.int64))
        widths = [cut.width(rank) for rank in range(self.size)]
        if self._hosts == (tuple(range(self.size)),):
            return self._join_local(x, n_rows, widths).reshape(*lead, sum(widths))
        local = [widths[rank] for rank in self._hosts[self._here]]
        block = self._join_local(x, n_rows, local)
        sizes = [n_rows * sum(widths[rank] for rank in ranks) for ranks in self._hosts]
        blocks = self._spread_blocks(block, sizes)
        out = np.empty((n_rows, sum(widths)), x.dtype)
        edges = np.cumsum([0, *widths])
        for ranks, flat in zip(self._hosts, blocks, strict=True):
            columns = flat.reshape(n_rows, sum(widths[rank] for rank in ranks))
            start = 0
            for rank in ranks:
                out[:, edges[rank] : edges[rank + 1]] = columns[:, start : start + widths[rank]]
                start += widths[rank]
        return out.reshape(*lead, sum(widths))

    def _join_local(self, x: np.ndarray, n_rows: int, widths: Sequence[int]) -> np.ndarray:
        """Return (n_rows, sum(widths)) of the ranks of this host."""
        out = np.empty((n_rows, sum(widths)), x.dtype)
        mine = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
        in_bytes = [width * x.itemsize for width in widths]
        self._segment.allgather(mine, n_rows, in_bytes, out.reshape(-1).view(np.uint8), self._late)
        return out

    def _spread_blocks(self, block: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        """Return the hosts' blocks, flat; the first rank of each host exchanges them."""
        whole = np.empty(sum(sizes), block.dtype)
        first = self._hosts[self._here][0] == self.rank
        mine = np.empty(0, block.dtype)
        if first and self._exchange is not None:
            mine = np.concatenate(self._exchange.allgather(block.reshape(-1), sizes))
        widths = [whole.nbytes] + [0] * (self._n_local - 1)
        self._segment.allgather(mine.view(np.uint8), 1, widths, whole.view(np.uint8), self._late)
        return np.split(whole, np.cumsum(sizes)[:-1])
