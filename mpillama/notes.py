"""Noting what crosses ranks in a step, for a backend that plays steps again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from mpillama.comm.base import Group
from mpillama.layout import Cut


class Notes(Protocol):
    """Takes note of calls that give the same results again, in the same place."""

    def note(self, result: np.ndarray, call: Callable[..., object], *args: Any) -> np.ndarray:
        """Note the call that has given a result; returns it."""
        ...

    def foreign(self, result: np.ndarray, call: Any) -> np.ndarray:
        """Note a call that native code can make; see `mpillama.comm.native.foreign.h`."""
        ...


class NotedGroup:
    """A group whose collectives are noted, with results of their own: a group may use the same memory again."""

    def __init__(self, group: Group, tape: Notes) -> None:
        self._group, self._tape = group, tape
        self.rank, self.size, self.leader = group.rank, group.size, group.leader
        self._native = getattr(group, "native_allreduce", lambda x: None)

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return the sum over the ranks."""
        out = self._group.allreduce(x)
        call = self._native(x) if out is x else None
        if call is not None:
            return self._tape.foreign(out, call)
        out = out.copy()
        return self._tape.note(out, _copied, out, self._group.allreduce, x)

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return the slices joined along the last axis."""
        out = self._group.allgather(x, cut).copy()
        return self._tape.note(out, _copied, out, self._group.allgather, x, cut)


def _copied(out: np.ndarray, collective: Callable[..., np.ndarray], *args: Any) -> None:
    np.copyto(out, collective(*args))
