"""What there is to know of an MPI library, and how fast it is. ``python -m mpillama.comm.probe`` prints the facts as
JSON: a process of its own can find out about a library that would end the one that loads it.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

_WARM_UP = 3


def mpi_facts() -> dict[str, Any]:
    """Load the MPI library and return what it says of itself; ``error`` if it cannot be loaded.

    ``memory`` are the kinds of memory that it takes buffers from, as far as it tells: ``cuda`` or ``rocm`` among them
    make it GPU-aware.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            import mpi4py
            from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return {"error": str(error).splitlines()[0] if str(error) else type(error).__name__}
    name, version = MPI.get_vendor()
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    try:
        memory = MPI.COMM_WORLD.Get_info().get("mpi_memory_alloc_kinds") or ""
    except MPI.Exception:
        # A library older than the key; nothing is known then.
        memory = ""
    return {
        "name": name,
        "version": ".".join(map(str, version)),
        "library": MPI.Get_library_version().split("\n")[0].strip("\0 "),
        "standard": ".".join(map(str, MPI.Get_version())),
        "mpi4py": mpi4py.__version__,
        "threads": levels.get(MPI.Query_thread(), "?"),
        "memory": memory,
        "size": MPI.COMM_WORLD.size,
    }


class Network:
    """Times messages between the ranks of a run; every method is called by all ranks together, and returns on all."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi = MPI
        self._world = MPI.COMM_WORLD.Dup()
        self._local = self._world.Split_type(MPI.COMM_TYPE_SHARED)

    def close(self) -> None:
        """Free the communicators."""
        self._local.Free()
        self._world.Free()

    def ping_pong(self, a: int, b: int, nbytes: int, seconds: float = 0.1) -> float:
        """Return the seconds that a message takes from rank ``a`` to rank ``b``: half of a round trip."""
        message, rank = np.zeros(nbytes, np.uint8), self._world.rank
        there, back = (self._world.Send, self._world.Recv) if rank == a else (self._world.Recv, self._world.Send)
        peer = b if rank == a else a

        def round_trip() -> None:
            there(message, peer)
            back(message, peer)

        passed = self._time(round_trip if rank in (a, b) else _nothing, seconds, (a, b))
        return passed / 2

    def allreduce(self, n_bytes: int, hosts: bool = False, seconds: float = 0.1) -> float:
        """Return the seconds of an allreduce of float32 over all ranks; ``hosts`` False: over those of one host."""
        comm = self._world if hosts else self._local
        values = np.zeros(n_bytes // 4, np.float32)
        return self._time(lambda: comm.Allreduce(self._mpi.IN_PLACE, values), seconds, range(self._world.size))

    def _time(self, action: Callable[[], None], seconds: float, ranks: Any) -> float:
        """Return the time of an action that ``ranks`` do together, as often as fits; the slowest rank's."""
        world = self._world
        world.Barrier()
        taken = 0.0
        if world.rank in ranks:
            for _ in range(_WARM_UP):
                action()
            began = time.perf_counter()
            for _ in range(_WARM_UP):
                action()
            taken = (time.perf_counter() - began) / _WARM_UP
        # All must repeat it equally often.
        estimate = world.allreduce(taken, self._mpi.MAX)
        n_times = int(min(2000.0, max(5.0, seconds / max(estimate, 1e-7))))
        world.Barrier()
        if world.rank in ranks:
            began = time.perf_counter()
            for _ in range(n_times):
                action()
            taken = (time.perf_counter() - began) / n_times
        return float(world.allreduce(taken, self._mpi.MAX))


def _nothing() -> None:
    """Stand aside."""


if __name__ == "__main__":
    print(json.dumps(mpi_facts()))
    sys.exit(0)
