"""Collectives between GPUs: NCCL, or RCCL on AMD, through CuPy. Written to their documentation; see docs/gpu.md."""

from __future__ import annotations

import warnings
from typing import Any, Protocol

from mpillama.comm.base import Group, Team
from mpillama.comm.staged import Holder, tensor_group
from mpillama.errors import PeerFailure, UserError
from mpillama.layout import Cut


class GpuMemory(Protocol):
    """A device, as far as collectives are concerned.

    Attributes:
        stream: the stream of all its work, as a number.
    """

    stream: int

    def empty(self, shape: tuple[int, ...]) -> Any:
        """Return a float32 array on the device."""
        ...


class NcclGroup:
    """All ranks of a run, each with a GPU; float32 arrays of CuPy.

    Every rank must make it at the same time. The id of the group travels through ``world``. A rank that fails raises
    at once and does not wait for the others, which may already be inside of NCCL: the caller must end the run.

    Args:
        world: all ranks.
        nccl: the module ``cupy.cuda.nccl``.
        device: of this rank, the current one of this thread.

    Raises:
        UserError: NCCL fails on this rank.
        PeerFailure: rank 0 could not even begin.
    """

    def __init__(self, world: Team, nccl: Any, device: GpuMemory) -> None:
        self.rank, self.size = world.rank, world.size
        self._nccl, self._device = nccl, device
        # A failure of rank 0 must not leave the others waiting for the id.
        problem, name = "", None
        if self.leader:
            try:
                name = nccl.get_unique_id()
            except (RuntimeError, OSError) as error:
                problem = str(error)
        problem, name = world.bcast((problem, name))
        if problem:
            if self.leader:
                failure = _failure("cannot begin", problem)
                failure.told = True
                raise failure
            raise PeerFailure(1)
        # Nobody may be inside of NCCL while another still needs MPI to get the id.
        world.bcast(world.gather(None))
        try:
            self._comm = nccl.NcclCommunicator(self.size, name, self.rank)
        except RuntimeError as error:
            raise _failure("cannot join the GPUs", str(error)) from None

    @property
    def leader(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    @property
    def capturable(self) -> bool:
        """Whether a device can record its collectives, which NCCL's can; ranks must record and launch alike."""
        return True

    def allreduce(self, x: Any) -> Any:
        """Return the sum over the ranks, in place."""
        if x.size:
            self._check("allReduce", x.data.ptr, x.data.ptr, x.size, self._nccl.NCCL_FLOAT32, self._nccl.NCCL_SUM)
        return x

    def allgather(self, x: Any, cut: Cut) -> Any:
        """Return the slices joined along the last axis; each rank broadcasts its own, since sizes differ."""
        lead = tuple(x.shape[:-1])
        parts = [x if rank == self.rank else self._device.empty((*lead, cut.width(rank))) for rank in range(self.size)]
        self._nccl.groupStart()
        for rank, part in enumerate(parts):
            if part.size:
                self._check("broadcast", part.data.ptr, part.data.ptr, part.size, self._nccl.NCCL_FLOAT32, rank)
        self._nccl.groupEnd()
        out = self._device.empty((*lead, sum(cut.width(rank) for rank in range(self.size))))
        start = 0
        for part in parts:
            out[..., start : start + part.shape[-1]] = part
            start += part.shape[-1]
        return out

    def _check(self, name: str, *args: Any) -> None:
        """Call NCCL, and learn of what went wrong in earlier calls.

        Raises:
            UserError: NCCL says so.
        """
        try:
            self._comm.check_async_error()
            getattr(self._comm, name)(*args, self._device.stream)
        except RuntimeError as error:
            raise _failure(f"failed in {name}", str(error)) from None


def _failure(what: str, problem: str) -> UserError:
    return UserError(
        f"NCCL {what}: {problem}; run with NCCL_DEBUG=WARN to learn more, or with MPILLAMA_COLLECTIVES=host to do "
        "without"
    )


def load_nccl() -> Any:
    """Return CuPy's NCCL module, or None where there is no NCCL."""
    with warnings.catch_warnings():
        # CuPy says in many words that it is missing.
        warnings.simplefilter("ignore")
        from cupy.cuda import nccl
    return nccl if nccl.available else None


def device_group(world: Team, backend: Any, by_host: bool, gpu: str = "") -> Group:
    """Return a group of all ranks for the arrays of this backend: NCCL's where all can, else by way of the host.

    They can where all compute on GPUs of one maker, each on its own, and all have the library.

    Args:
        world: all ranks.
        backend: of this rank.
        by_host: go by way of the host in any case.
        gpu: what tells this rank's GPU from others of its host; "" if nothing does.

    Raises:
        UserError: see `NcclGroup`.
    """
    holder: Holder = backend
    if world.size > 1 and not by_host:
        nccl = load_nccl() if backend.name in ("cuda", "hip") else None
        everyone = world.bcast(world.gather((backend.name if nccl else "", world.hosts[world.rank], gpu)))
        makers = {maker for maker, _, _ in everyone}
        known = [(host, name) for _, host, name in everyone if name]
        if len(makers) == 1 and "" not in makers and len(set(known)) == len(known):
            return NcclGroup(world, nccl, backend.device)
    return tensor_group(world.group(), holder)
