"""Ranks as MPI processes. Importing this module initializes MPI."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

from mpillama.comm.base import Group
from mpillama.comm.board import Board, share_file
from mpillama.comm.exchange import BUSY, IDLE, MPIExchange, poll
from mpillama.comm.mpi_link import MPICourier, MPILink
from mpillama.comm.shared import (
    CAPACITY,
    CAPACITY_NETWORK,
    SharedGroup,
    native_module_is_built,
    open_segment,
    segment_bytes,
)
from mpillama.comm.watch import DEFAULT_LIMIT, Watch
from mpillama.layout import Cut

# A decode step's plan fits into one broadcast of this many int32; longer ones take a second.
_HEAD = 1024
_PROGRESS, _MAIL = 1, 2
# Seconds.
_ABORT_TAKES = 3.0
# Beats of rank 0's heart between two that the other hosts are told of.
_BEATS_PER_MESSAGE = 4


class MPIGroup:
    """Host arrays over an MPI communicator, without shared memory."""

    def __init__(self, comm: MPI.Comm, ranks: Sequence[int], watch: Watch) -> None:
        self._exchange, self._watch = MPIExchange(comm, ranks, watch), watch
        self.rank, self.size = comm.rank, comm.size

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks, in place where ``x`` is contiguous."""
        x = np.ascontiguousarray(x)
        self._watch.begin("allreduce")
        self._exchange.allreduce(x.reshape(-1))
        return x

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        self._watch.begin("allgather")
        lead = x.shape[:-1]
        n_rows = int(np.prod(lead, dtype=np.int64))
        widths = [cut.width(rank) for rank in range(self.size)]
        parts = self._exchange.allgather(x, [n_rows * width for width in widths])
        return np.concatenate([p.reshape(*lead, width) for p, width in zip(parts, widths, strict=True)], axis=-1)


class MPITeam:
    """Some of the ranks of a job.

    Args:
        comm: of these ranks; not used for messages itself.
        job_ranks: their numbers in the job.
        hosts: of the ranks.
        by_host: the ranks on each host.
        board_ranks: the ranks of the job that are on this rank's board, in its order.
        shared: whether ranks of one host exchange through shared memory.
        crowded: whether they have to share cores.
        watch: over all ranks of the job.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        job_ranks: Sequence[int],
        hosts: Sequence[str],
        by_host: Sequence[Sequence[int]],
        board_ranks: Sequence[int],
        shared: bool,
        crowded: bool,
        watch: Watch,
    ) -> None:
        self._comm, self.rank, self.size = comm, comm.rank, comm.size
        self.job_ranks, self.hosts, self.watch = tuple(job_ranks), tuple(hosts), watch
        self._by_host, self._board_ranks = tuple(tuple(ranks) for ranks in by_host), tuple(board_ranks)
        self._shared, self._crowded = shared, crowded
        self._control, self._link_comm = comm.Dup(), comm.Dup()
        self._groups: list[MPI.Comm] = []
        # Kept to the end: what a link is still sending must not be freed with its user.
        self._links: dict[int, MPILink] = {}

    def group(self, ranks: Sequence[int] | None = None) -> Group:
        """Return the group of all ranks, or of these; each rank names those of its own group."""
        members = tuple(range(self.size)) if ranks is None else tuple(ranks)
        comm = self._comm.Split(members[0], members.index(self.rank))
        self._groups.append(comm)
        names = [self.job_ranks[rank] for rank in members]
        if not self._shared or len(members) == 1:
            return MPIGroup(comm, names, self.watch)
        by_host = [[rank for rank in host if rank in members] for host in self._by_host]
        by_host = [host for host in by_host if host]
        here = next(i for i, host in enumerate(by_host) if self.rank in host)
        local = comm.Split(here, comm.rank)
        self._groups.append(local)
        capacity = CAPACITY if len(by_host) == 1 else CAPACITY_NETWORK
        nbytes = segment_bytes(local.size, capacity)
        fd = share_file(local, nbytes)
        if not all(comm.allgather(fd is not None)) or fd is None:
            return MPIGroup(comm, names, self.watch)
        segment = open_segment(mmap.mmap(fd, nbytes), local.rank, local.size, capacity, self._crowded)
        os.close(fd)
        exchange = None
        if len(by_host) > 1:
            counterparts = comm.Split(local.rank, here)
            self._groups.append(counterparts)
            if local.rank < min(map(len, by_host)):
                carriers = [self.job_ranks[host[local.rank]] for host in by_host]
                exchange = MPIExchange(counterparts, carriers, self.watch)
        places = [self._board_ranks.index(self.job_ranks[rank]) for rank in by_host[here]]
        numbers = [[members.index(rank) for rank in host] for host in by_host]
        return SharedGroup(comm.rank, numbers, segment, exchange, self.watch, places)

    def communicator(self) -> MPI.Comm:
        """Return a communicator of these ranks for somebody's own use."""
        comm = self._comm.Dup()
        self._groups.append(comm)
        return comm

    def link(self, partner: int) -> MPILink:
        """Return the channel to another rank."""
        return self._links.setdefault(partner, MPILink(self._link_comm, partner, self.watch))

    def courier(self) -> MPICourier:
        """Return a courier with a communicator of its own."""
        return MPICourier(self._comm.Dup(), self.watch)

    def bcast(self, value: Any) -> Any:
        """Return rank 0's value; the others wait without occupying a core."""
        self._wait_idle(self._control.Ibarrier())
        return self._control.bcast(value)

    def gather(self, value: Any) -> list[Any]:
        """Return all values on rank 0."""
        self._wait_idle(self._control.Ibarrier())
        return self._control.gather(value) or []

    def agree(self, signature: int) -> list[int]:
        """Return the signatures (64 bits) of all ranks."""
        self.watch.begin("agreement")
        everyone = np.empty(self.size, np.uint64)
        self._wait_in_step(self._control.Iallgather(np.array([signature], np.uint64), everyone))
        return [int(signature) for signature in everyone]

    def send(self, message: np.ndarray) -> None:
        """Broadcast a message."""
        self.watch.begin("plan")
        head = np.zeros(_HEAD, np.int32)
        head[0] = message.size
        head[1 : 1 + message.size] = message[: _HEAD - 1]
        self._wait_in_step(self._control.Ibcast(head))
        if message.size > _HEAD - 1:
            self._wait_in_step(self._control.Ibcast(np.ascontiguousarray(message[_HEAD - 1 :])))

    def receive(self) -> np.ndarray:
        """Take the next message."""
        head = np.empty(_HEAD, np.int32)
        self._wait_idle(self._control.Ibcast(head))
        size = int(head[0])
        if size <= _HEAD - 1:
            return head[1 : 1 + size]
        self.watch.begin("plan")
        rest = np.empty(size - (_HEAD - 1), np.int32)
        self._wait_in_step(self._control.Ibcast(rest))
        return np.concatenate([head[1:], rest])

    def _wait_in_step(self, request: MPI.Request) -> None:
        poll(request.Test, lambda: self.watch.late_elsewhere(()), BUSY)

    def _wait_idle(self, request: MPI.Request) -> None:
        poll(request.Test, self.watch.idle, IDLE)

    def _free(self) -> None:
        for comm in (*self._groups, self._control, self._link_comm):
            comm.Free()


class MPIWorld(MPITeam):
    """All ranks of a communicator.

    Args:
        limit: seconds that a rank waits for another inside a step; 0: for ever.
        hosts: names of hosts to pretend, one for each rank; ranks of the same name share memory.
        shared: whether ranks of one host exchange through shared memory (where that can be had).
        comm: whose ranks they are; not used for messages itself.
        embedded: whether MPI belongs to a program that goes on after `close`.
    """

    def __init__(
        self,
        limit: float = DEFAULT_LIMIT,
        hosts: Sequence[str] = (),
        shared: bool = True,
        comm: MPI.Intracomm = MPI.COMM_WORLD,
        embedded: bool = False,
    ) -> None:
        self._embedded = embedded
        rank, size = comm.rank, comm.size
        self._progress, self._pulse = comm.Dup(), comm.Dup()
        control = self._progress
        self._requests: list[MPI.Request] = []
        self._pulses: list[MPI.Request] = []
        self._coming: list[tuple[int, MPI.Request]] = []
        self._parts: list[MPITeam] = []
        self._n_beats = 0
        if hosts:
            local = comm.Split(hosts.index(hosts[rank]), rank)
        else:
            local = comm.Split_type(MPI.COMM_TYPE_SHARED, rank)
            hosts = control.allgather(MPI.Get_processor_name())
        self._local = local
        self.local_rank, self.local_size = local.rank, local.size
        members = control.allgather(tuple(local.allgather(rank)))
        by_host = tuple(dict.fromkeys(members))
        fd = share_file(local, Board.nbytes(local.size))
        # Only if every host can: all ranks must form the same kind of group.
        shared = all(control.allgather(shared and fd is not None and native_module_is_built()))
        crowded = self._count_cores() < local.size
        if fd is None:
            ranks: tuple[int, ...] = (rank,)
            board = Board(bytearray(Board.nbytes(1)), None, 0, 1)
        else:
            ranks = members[rank]
            board = Board(mmap.mmap(fd, Board.nbytes(local.size)), fd, local.rank, local.size)
        self._board = board
        # What hearts say to other hosts they say from a thread of their own.
        threads = all(control.allgather(MPI.Query_thread() == MPI.THREAD_MULTIPLE))
        far = len(by_host) > 1 and threads
        hears = [] if rank or not far else [first for first, *_ in by_host[1:]]
        watch = Watch(ranks, hosts, board, limit, hears_root=far, hears=hears)
        super().__init__(comm, range(size), hosts, by_host, ranks, shared, crowded, watch)
        local.Barrier()
        board.start_heart(self._pass_pulse if far and self.local_rank == 0 else None)

    def part(self, ranks: Sequence[int]) -> MPITeam:
        """Return the team of some ranks."""
        team = MPITeam(
            self._comm.Split(ranks[0], self.rank),
            ranks,
            [self.hosts[rank] for rank in ranks],
            [here for host in self._by_host if (here := [ranks.index(rank) for rank in host if rank in ranks])],
            self._board_ranks,
            self._shared,
            self._crowded,
            self.watch,
        )
        self._parts.append(team)
        return team

    def _pass_pulse(self) -> None:
        """Send the beats of rank 0's heart to the first rank of each other host, which answers with its own."""
        status = MPI.Status()
        while self._pulse.Iprobe(status=status):
            beats = self._pulse.recv(None, status.source)
            if self.rank:
                # For all ranks of this host.
                self._board.root_beat(beats)
            else:
                self.watch.hear(status.source)
        self._n_beats += 1
        if self._n_beats % _BEATS_PER_MESSAGE == 0:
            self._pulses = [pulse for pulse in self._pulses if not pulse.Test()]
            targets = [0] if self.rank else [ranks[0] for ranks in self._by_host[1:]]
            self._pulses += [self._pulse.isend(self._n_beats, target) for target in targets]

    def _count_cores(self) -> int:
        """Return the number of cores that the ranks of this host may run on, together."""
        cores = self._local.allgather(os.sched_getaffinity(0))
        return len(set().union(*cores))

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

    def post(self, rank: int, value: Any) -> None:
        """Send an object to another rank."""
        self._requests = [request for request in self._requests if not request.Test()]
        self._requests.append(self._progress.isend(value, rank, _MAIL))

    def fetch(self, seconds: float = 0.0) -> list[tuple[int, Any]]:
        """Return what others have posted, after so many seconds if there is nothing before."""
        arrived: list[tuple[int, Any]] = []

        def done() -> bool:
            arrived.extend(self._take_mail())
            return bool(arrived)

        self.watch.idle()
        if not done() and seconds > 0:
            poll(done, self.watch.idle, IDLE, seconds)
        return arrived

    def _take_mail(self) -> list[tuple[int, Any]]:
        """Return what has come in; of a large object there may be only the beginning, for which nobody waits."""
        status = MPI.Status()
        while (message := self._progress.improbe(MPI.ANY_SOURCE, _MAIL, status)) is not None:
            self._coming.append((status.source, message.irecv()))
        arrived, coming = [], []
        behind: set[int] = set()
        for source, request in self._coming:
            done, value = (False, None) if source in behind else request.test()
            if done:
                arrived.append((source, value))
            else:
                behind.add(source)
                coming.append((source, request))
        self._coming = coming
        return arrived

    def abort(self, exit_code: int) -> None:
        """End all ranks now."""
        # Where the launcher is ending the job already, MPI's own way out may return, or wait for an answer for ever.
        last_resort = threading.Timer(_ABORT_TAKES, os._exit, (exit_code,))
        last_resort.daemon = True
        last_resort.start()
        self._comm.Abort(exit_code)
        os._exit(exit_code)

    def close(self) -> None:
        """Wait for all ranks, asleep, and finalize MPI, or leave it to the program that it belongs to."""
        self._wait_idle(self._control.Ibarrier())
        self._board.stop_heart()
        self._wait_idle(self._control.Ibarrier())
        while self._pulse.Iprobe():
            self._pulse.recv()
        if not self._embedded:
            MPI.Finalize()
            return
        MPI.Request.Waitall([*self._requests, *self._pulses])
        for comm in (self._progress, self._pulse, self._local):
            comm.Free()
        for team in (*self._parts, self):
            team._free()
