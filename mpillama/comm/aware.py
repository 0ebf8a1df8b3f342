"""Collectives of GPU arrays by an MPI library that takes addresses of GPU memory ("CUDA-aware", "ROCm-aware")."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI

from mpillama.comm.exchange import BUSY, poll
from mpillama.comm.watch import Watch
from mpillama.layout import Cut


class AwareGroup:
    """Ranks with a GPU each; float32 arrays of CuPy. Only when the user says so: other libraries crash.

    Args:
        comm: of the ranks, used for nothing else.
        backend: of this rank; see `nccl.OnGpu`.
        watch: over those that keep this rank waiting.
    """

    capturable = False
    """Whether a device can record its collectives."""

    def __init__(self, comm: MPI.Comm, backend: Any, watch: Watch) -> None:
        self._comm, self._backend, self._watch = comm, backend, watch
        self.rank, self.size = comm.rank, comm.size

    @property
    def leader(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == 0

    def allreduce(self, x: Any) -> Any:
        """Return the sum over the ranks, in place."""
        if x.size:
            self._begin("allreduce")
            self._wait(self._comm.Iallreduce(MPI.IN_PLACE, _numbers(x)))
        return x

    def allgather(self, x: Any, cut: Cut) -> Any:
        """Return the slices joined along the last axis; each rank broadcasts its own, since sizes differ."""
        lead = tuple(x.shape[:-1])
        empty = self._backend.device.empty
        parts = [x if rank == self.rank else empty((*lead, cut.width(rank))) for rank in range(self.size)]
        self._begin("allgather")
        for rank, part in enumerate(parts):
            if part.size:
                self._wait(self._comm.Ibcast(_numbers(part), rank))
        return self._backend.join(parts)

    def _begin(self, what: str) -> None:
        self._watch.begin(what)
        # MPI knows nothing of the stream.
        self._backend.device.synchronize()

    def _wait(self, request: MPI.Request) -> None:
        poll(request.Test, lambda: self._watch.late_elsewhere(()), BUSY)


def _numbers(x: Any) -> list[Any]:
    return [MPI.buffer.fromaddress(x.data.ptr, x.nbytes), x.size, MPI.FLOAT]
