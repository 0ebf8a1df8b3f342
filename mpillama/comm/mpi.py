"""Ranks as MPI processes. Importing this module initializes MPI."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from mpi4py import MPI

from mpillama.layout import Cut

# A decode step's plan fits into one broadcast of this many int32; longer ones take a second.
_HEAD = 1024
_PROGRESS = 1


class MPIGroup:
    """Host arrays over an MPI communicator."""

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self.rank, self.size = comm.rank, comm.size

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks, in place."""
        x = np.ascontiguousarray(x)
        self._comm.Allreduce(MPI.IN_PLACE, x, MPI.SUM)
        return x

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        lead = x.shape[:-1]
        n_rows = int(np.prod(lead, dtype=np.int64))
        counts = [n_rows * cut.width(rank) for rank in range(self.size)]
        flat = np.empty(sum(counts), x.dtype)
        self._comm.Allgatherv(np.ascontiguousarray(x), [flat, counts])
        parts = np.split(flat, np.cumsum(counts)[:-1])
        return np.concatenate([part.reshape(*lead, cut.width(rank)) for rank, part in enumerate(parts)], axis=-1)


class MPIWorld:
    """All ranks of a communicator.

    Args:
        comm: whose ranks they are; not used for messages itself.
        embedded: whether MPI belongs to a program that goes on after `close`.
    """

    def __init__(self, comm: MPI.Comm = MPI.COMM_WORLD, embedded: bool = False) -> None:
        self._comm, self._embedded = comm, embedded
        world = comm
        self.rank, self.size = world.rank, world.size
        self._control = world.Dup()
        self._progress = world.Dup()
        self._groups: list[MPI.Comm] = []
        self._requests: list[MPI.Request] = []
        self.hosts = tuple(self._control.allgather(MPI.Get_processor_name()))
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        self.local_rank, self.local_size = local.rank, local.size
        local.Free()

    def group(self) -> MPIGroup:
        """Return the group of all ranks, on a communicator of its own."""
        self._groups.append(self._comm.Dup())
        return MPIGroup(self._groups[-1])

    def bcast(self, value: Any) -> Any:
        """Return rank 0's value; the others wait without occupying a core."""
        ready = self._control.Ibarrier()
        self._wait(ready)
        return self._control.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        """Return all values on rank 0."""
        return self._control.gather(value) or []

    def send(self, message: np.ndarray) -> None:
        """Broadcast a message."""
        head = np.zeros(_HEAD, np.int32)
        head[0] = message.size
        head[1 : 1 + message.size] = message[: _HEAD - 1]
        self._control.Ibcast(head).Wait()
        if message.size > _HEAD - 1:
            self._control.Bcast(np.ascontiguousarray(message[_HEAD - 1 :]))

    def receive(self) -> np.ndarray:
        """Take the next message."""
        head = np.empty(_HEAD, np.int32)
        self._wait(self._control.Ibcast(head))
        size = int(head[0])
        if size <= _HEAD - 1:
            return head[1 : 1 + size]
        rest = np.empty(size - (_HEAD - 1), np.int32)
        self._control.Bcast(rest)
        return np.concatenate([head[1:], rest])

    @staticmethod
    def _wait(request: MPI.Request) -> None:
        """Wait by polling: MPI libraries spin in their own waits, at a whole core for each idle rank."""
        for _ in range(20):
            if request.Test():
                return
            os.sched_yield()
        pause = 20e-6
        while not request.Test():
            time.sleep(pause)
            pause = min(pause * 1.5, 1e-3)

    def report(self, amount: int) -> None:
        """Send some progress to rank 0."""
        if self.rank:
            self._requests = [request for request in self._requests if not request.Test()]
            self._requests.append(self._progress.isend(amount, 0, _PROGRESS))

    def reported(self) -> int:
        """Return the progress that has arrived."""
        total = 0
        while self._progress.Iprobe(MPI.ANY_SOURCE, _PROGRESS):
            total += self._progress.recv(None, MPI.ANY_SOURCE, _PROGRESS)
        return total

    def abort(self, exit_code: int) -> None:
        """End all ranks now."""
        self._comm.Abort(exit_code)

    def close(self) -> None:
        """Wait for all ranks, asleep, and finalize MPI, or leave it to the program that it belongs to."""
        self._wait(self._control.Ibarrier())
        if not self._embedded:
            MPI.Finalize()
            return
        MPI.Request.Waitall(self._requests)
        for comm in (self._control, self._progress, *self._groups):
            comm.Free()
