"""Ranks that are threads of one process but go through shared memory, on as many hosts as a test pretends."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from mpillama.comm.board import Board
from mpillama.comm.shared import SharedGroup, open_segment, segment_bytes
from mpillama.comm.threads import ThreadWorld, run_threads
from mpillama.comm.watch import Watch

T = TypeVar("T")


class ThreadExchange:
    """Counterparts on pretended hosts, which hand over their arrays through a list."""

    def __init__(self, slots: list[Any], barrier: threading.Barrier, here: int) -> None:
        self._slots, self._barrier, self._here = slots, barrier, here

    def _all(self, value: np.ndarray) -> list[np.ndarray]:
        self._slots[self._here] = value.copy()
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def allreduce(self, x: np.ndarray) -> None:
        total, *others = self._all(x)
        total = total.copy()
        for other in others:
            total += other
        x[:] = total

    def allgather(self, mine: np.ndarray, sizes: Sequence[int]) -> list[np.ndarray]:
        values = self._all(mine)
        assert [value.size for value in values] == list(sizes)
        return values


def run_shared(
    hosts: Sequence[Sequence[int]], main: Callable[[ThreadWorld], T], capacity: int = 1 << 14, limit: float = 30.0
) -> list[T]:
    """Run ``main`` once for each rank; `group()` of its world shares memory with the ranks of the same host."""
    n_carriers = min(map(len, hosts))
    barriers = [threading.Barrier(len(hosts), timeout=limit) for _ in range(n_carriers)]
    slots: list[list[Any]] = [[None] * len(hosts) for _ in range(n_carriers)]
    memory = [mmap.mmap(-1, segment_bytes(len(ranks), capacity)) for ranks in hosts]
    boards = [bytearray(Board.nbytes(len(ranks))) for ranks in hosts]
    names = {rank: f"host{h}" for h, ranks in enumerate(hosts) for rank in ranks}

    class World(ThreadWorld):
        def group(self) -> SharedGroup:
            here = next(h for h, ranks in enumerate(hosts) if self.rank in ranks)
            ranks = hosts[here]
            place = ranks.index(self.rank)
            board = Board(boards[here], None, place, len(ranks))
            self.watch = Watch(ranks, [names[rank] for rank in range(self.size)], board, limit)
            exchange = None
            if len(hosts) > 1 and place < n_carriers:
                exchange = ThreadExchange(slots[place], barriers[place], here)
            segment = open_segment(memory[here], place, len(ranks), capacity, crowded=True)
            return SharedGroup(self.rank, hosts, segment, exchange, self.watch)

    return run_threads(sum(map(len, hosts)), lambda world: main(World(world._board, world.rank)), limit)
