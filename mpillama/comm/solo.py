"""One rank alone: every collective is the identity. Needs no MPI library."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpillama.comm.base import Courier, Link, Team
from mpillama.comm.board import Board
from mpillama.comm.watch import Watch
from mpillama.layout import Cut


class SoloGroup:
    """A group of one."""

    rank = 0
    size = 1
    leader = True

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Return ``x``."""
        return x

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Return ``x``."""
        return x


class SoloWorld:
    """A run of one rank."""

    rank = 0
    size = 1
    local_rank = 0
    local_size = 1
    job_ranks: tuple[int, ...] = (0,)

    def __init__(self) -> None:
        self.hosts: tuple[str, ...] = (socket.gethostname(),)
        self.watch = Watch((0,), self.hosts, Board(bytearray(Board.nbytes(1)), None, 0, 1), 0.0)

    def group(self, ranks: Sequence[int] | None = None) -> SoloGroup:
        """Return the group of one."""
        return SoloGroup()

    def link(self, partner: int) -> Link:
        """Raise: there is no other rank."""
        raise RuntimeError(f"a run of one rank has no rank {partner}")

    def courier(self) -> Courier:
        """Raise: there is nobody to send to."""
        raise RuntimeError("a run of one rank sends nothing")

    def bcast(self, value: Any) -> Any:
        """Return ``value``."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the one value."""
        return [value]

    def agree(self, signature: int) -> list[int]:
        """Return the one signature."""
        return [signature]

    def send(self, message: np.ndarray) -> None:
        """Nobody else is there to take it."""

    def receive(self) -> np.ndarray:
        """Raise: rank 0 never waits for itself."""
        raise RuntimeError("rank 0 has no one to receive from")

    def part(self, ranks: Sequence[int]) -> Team:
        """Return this world."""
        return self

    def post(self, rank: int, value: Any) -> None:
        """Raise: there is no other rank."""
        raise RuntimeError(f"a run of one rank has no rank {rank}")

    def fetch(self, seconds: float = 0.0) -> list[tuple[int, Any]]:
        """Return nothing."""
        return []

    def report(self, amount: int) -> None:
        """Rank 0 counts its own progress."""

    def reported(self) -> int:
        """Return 0."""
        return 0

    def abort(self, exit_code: int) -> None:
        """End the process without running any more of it."""
        os._exit(exit_code)

    def close(self) -> None:
        """Nothing is held."""


class StrandedWorld(SoloWorld):
    """A rank that could not join the others, and why: for commands that find out what is wrong."""

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason
