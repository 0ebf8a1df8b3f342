"""Collectives of device arrays by way of the host, for groups that know host arrays only."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from mpillama.comm.base import Group
from mpillama.layout import Cut


class Holder(Protocol):
    """A backend, as far as arrays are concerned."""

    host_arrays: bool

    def asarray(self, x: np.ndarray) -> Any:
        """Bring a host array over."""
        ...

    def to_host(self, x: Any) -> np.ndarray:
        """Return a host array."""
        ...


class StagedGroup:
    """A group for the arrays of a backend, over a group for host arrays."""

    def __init__(self, group: Group, holder: Holder) -> None:
        self._group, self._holder = group, holder
        self.rank, self.size = group.rank, group.size

    @property
    def leader(self) -> bool:
        """Whether this rank adds replicated terms to a partial sum."""
        return self._group.leader

    @property
    def capturable(self) -> bool:
        """Whether a device can record its collectives: only where there are none."""
        return self.size == 1

    def allreduce(self, x: Any) -> Any:
        """Return the sum over the ranks."""
        return self._holder.asarray(self._group.allreduce(self._holder.to_host(x))) if self.size > 1 else x

    def allgather(self, x: Any, cut: Cut) -> Any:
        """Return the slices joined along the last axis."""
        return self._holder.asarray(self._group.allgather(self._holder.to_host(x), cut)) if self.size > 1 else x


def tensor_group(group: Group, holder: Holder) -> Group:
    """Return a group for the arrays of this backend, over one for host arrays."""
    return group if holder.host_arrays else StagedGroup(group, holder)
