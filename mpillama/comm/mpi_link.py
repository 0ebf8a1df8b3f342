"""Arrays from one MPI process to one other, so that the sender can compute while they travel; bytes from any to any.

Most MPI libraries move a large message only while both sides are inside of MPI, and a rank that computes is not. So a
sender lingers for as long as the transfer would take: a partner that waits already gets the array at once. One that
does not gets it when the sender comes back, which is before the next array goes out.
"""

from __future__ import annotations

import numpy as np
from mpi4py import MPI

from mpillama.comm.exchange import BUSY, poll
from mpillama.comm.watch import Watch

# Time for a message to be met by a waiting partner, seconds, and a slow network's bytes per second.
_LINGER, _BYTES_PER_SECOND = 300e-6, 1e9


class MPIArrival:
    """A receive that has begun."""

    def __init__(self, request: MPI.Request, x: np.ndarray, watch: Watch) -> None:
        self._request, self._x, self._watch = request, x, watch

    def wait(self) -> np.ndarray:
        """Return the array."""
        poll(self._request.Test, self._watch.idle, BUSY)
        return self._x


class MPILink:
    """A channel to one partner; messages of a pair of ranks keep their order."""

    def __init__(self, comm: MPI.Comm, partner: int, watch: Watch) -> None:
        self._comm, self._partner, self._watch = comm, partner, watch
        self._sent = MPI.REQUEST_NULL

    def send(self, x: np.ndarray) -> None:
        """Begin to send, after the array before has been taken."""
        poll(self._sent.Test, self._watch.idle, BUSY)
        # The request keeps the array alive.
        self._sent = self._comm.Isend(np.ascontiguousarray(x), self._partner)
        poll(self._sent.Test, self._watch.idle, BUSY, _LINGER + x.nbytes / _BYTES_PER_SECOND)

    def expect(self, shape: tuple[int, ...]) -> MPIArrival:
        """Begin to receive the next array."""
        x = np.empty(shape, np.float32)
        return MPIArrival(self._comm.Irecv(x, self._partner), x, self._watch)

    def receive(self, shape: tuple[int, ...]) -> np.ndarray:
        """Wait for the next array."""
        return self.expect(shape).wait()


class MPICourier:
    """Bytes between all ranks of a communicator, which is its own."""

    def __init__(self, comm: MPI.Comm, watch: Watch) -> None:
        self._comm, self._watch = comm, watch
        self._sent: list[MPI.Request] = []

    def send(self, rank: int, data: np.ndarray) -> None:
        """Begin to send; the request keeps the data alive."""
        self._sent.append(self._comm.Isend([data, MPI.BYTE], rank))

    def flush(self) -> None:
        """Wait until all is taken."""
        poll(self._all_taken, self._watch.idle, BUSY)

    def _all_taken(self) -> bool:
        self._sent = [request for request in self._sent if not request.Test()]
        return not self._sent

    def receive(self, rank: int, out: np.ndarray) -> int:
        """Wait for the next message of a rank."""
        status = MPI.Status()
        request = self._comm.Irecv([out, MPI.BYTE], rank)
        poll(lambda: request.Test(status), self._watch.idle, BUSY)
        return int(status.Get_count(MPI.BYTE))

    def progress(self) -> None:
        """Let MPI move what is on its way, and look after the other ranks."""
        self._all_taken()
        self._watch.idle()

    def close(self) -> None:
        """Wait for all that is sent, and free the communicator."""
        self.flush()
        self._comm.Free()
