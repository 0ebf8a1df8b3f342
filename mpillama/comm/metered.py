"""A group that counts and times its collectives."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from mpillama.comm.base import Group
from mpillama.layout import Cut


class Traffic:
    """What a rank has spent in collectives.

    Attributes:
        counts: int64 (3,), that native code can add to: the three below.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(3, np.int64)

    @property
    def calls(self) -> int:
        """Collectives."""
        return int(self.counts[0])

    @property
    def nbytes(self) -> int:
        """Bytes of their results, as the rank gets them."""
        return int(self.counts[1])

    @property
    def ns(self) -> int:
        """Nanoseconds from call to return, waiting for slower ranks included."""
        return int(self.counts[2])


class MeteredGroup:
    """Hands every collective on to another group, and keeps account of it.

    Collectives between GPUs are over for the caller once they are queued; those of a recorded step it does not see.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self.rank, self.size = group.rank, group.size
        self._traffic = Traffic()

    @property
    def leader(self) -> bool:
        """Whether this rank adds replicated terms to a partial sum."""
        return self._group.leader

    @property
    def capturable(self) -> bool:
        """Whether a device can record its collectives."""
        return bool(getattr(self._group, "capturable", self.size == 1))

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks."""
        began = time.perf_counter_ns()
        return self._counted(self._group.allreduce(x), began)

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        began = time.perf_counter_ns()
        return self._counted(self._group.allgather(x, cut), began)

    def native_allreduce(self, x: np.ndarray) -> Any:
        """Return an allreduce that native code makes again and again, or None; see `SharedGroup`."""
        make = getattr(self._group, "native_allreduce", None)
        return make(x, self._traffic.counts) if make else None

    def _counted(self, result: np.ndarray, began: int) -> np.ndarray:
        self._traffic.counts += 1, result.nbytes, time.perf_counter_ns() - began
        return result

    @property
    def traffic(self) -> Traffic:
        """What there has been since the last `take`; it goes on counting."""
        return self._traffic

    def take(self) -> Traffic:
        """Return the traffic since the last call."""
        taken = Traffic()
        taken.counts += self._traffic.counts
        self._traffic.counts -= taken.counts
        return taken
