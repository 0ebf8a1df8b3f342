"""A group that counts and times its collectives."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from mpillama.comm.base import Group
from mpillama.layout import Cut


@dataclass
class Traffic:
    """What a rank has spent in collectives.

    Attributes:
        calls: collectives.
        nbytes: bytes of their results, as the rank gets them.
        ns: nanoseconds from call to return, waiting for slower ranks included.
    """

    calls: int = 0
    nbytes: int = 0
    ns: int = 0


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

    def _counted(self, result: np.ndarray, began: int) -> np.ndarray:
        traffic = self._traffic
        traffic.ns += time.perf_counter_ns() - began
        traffic.calls += 1
        traffic.nbytes += result.nbytes
        return result

    @property
    def traffic(self) -> Traffic:
        """What there has been since the last `take`; it goes on counting."""
        return self._traffic

    def take(self) -> Traffic:
        """Return the traffic since the last call."""
        traffic, self._traffic = self._traffic, Traffic()
        return traffic
