"""Arrays from one MPI process to one other, so that the sender can compute while they travel.

Most MPI libraries move a large message only while both sides are inside of MPI, and a rank that computes is not. So a
sender lingers for as long as the transfer would take: a partner that waits already gets the array at once. One that
does not gets it when the sender comes back, which is before the next array goes out.
"""

from __future__ import annotations

import os
import time

import numpy as np
from mpi4py import MPI

from mpillama.comm.watch import Watch

# Time for a message to be met by a waiting partner, seconds, and a slow network's bytes per second.
_LINGER, _BYTES_PER_SECOND = 300e-6, 1e9
# Waits inside of a step are short: the longest nap, seconds.
_NAP = 100e-6


def _poll(request: MPI.Request, watch: Watch, seconds: float = float("inf")) -> bool:
    """Wait for a request, at first awake and then with naps; returns whether it is complete after that time.

    How long a stage computes depends on the model, so this has no limit; but a partner that has died or stopped is
    noticed.
    """
    for _ in range(50):
        if request.Test():
            return True
        os.sched_yield()
    end, pause = time.monotonic() + seconds, 10e-6
    while not request.Test():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, _NAP)
        watch.idle()
    return True


class MPIArrival:
    """A receive that has begun."""

    def __init__(self, request: MPI.Request, x: np.ndarray, watch: Watch) -> None:
        self._request, self._x, self._watch = request, x, watch

    def wait(self) -> np.ndarray:
        """Return the array."""
        _poll(self._request, self._watch)
        return self._x


class MPILink:
    """A channel to one partner; messages of a pair of ranks keep their order."""

    def __init__(self, comm: MPI.Comm, partner: int, watch: Watch) -> None:
        self._comm, self._partner, self._watch = comm, partner, watch
        self._sent = MPI.REQUEST_NULL

    def send(self, x: np.ndarray) -> None:
        """Begin to send, after the array before has been taken."""
        _poll(self._sent, self._watch)
        # The request keeps the array alive.
        self._sent = self._comm.Isend(np.ascontiguousarray(x), self._partner)
        _poll(self._sent, self._watch, _LINGER + x.nbytes / _BYTES_PER_SECOND)

    def expect(self, shape: tuple[int, ...]) -> MPIArrival:
        """Begin to receive the next array."""
        x = np.empty(shape, np.float32)
        return MPIArrival(self._comm.Irecv(x, self._partner), x, self._watch)

    def receive(self, shape: tuple[int, ...]) -> np.ndarray:
        """Wait for the next array."""
        return self.expect(shape).wait()
