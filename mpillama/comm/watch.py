"""How long a rank waits for others, and whom it then names."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from mpillama.comm.board import BEAT, Board
from mpillama.errors import JobError

DEFAULT_LIMIT = 60.0
"""Seconds that a rank waits inside a step unless told otherwise."""

_KINDS = ("start", "plan", "allreduce", "allgather", "agreement")
_CODES = {kind: code for code, kind in enumerate(_KINDS)}
# Those that all ranks begin alike; they are numbered within a step.
_COUNTED = (_CODES["allreduce"], _CODES["allgather"])

# A launcher notices a dead rank by itself, and says more about it; most do within a second.
_DEAD_FOR = 1.5
# Who waits over the network lets those speak first who see the late rank itself, and after them its counterparts.
_GRACE_NETWORK = 2.0
_GRACE_BEHIND = 4.0
# A rank that waits itself says so at least this often.
_WAITS = 1.0
# Time that the whole job was stopped (a suspended job, a closed lid) is no time of waiting.
_LONGEST_NAP = 0.5


class Watch:
    """Counts the steps and collectives of a rank, and looks after the others while it waits for them.

    Args:
        ranks: of the run, that share this rank's board, in the board's order.
        hosts: of all ranks of the run.
        board: of this host.
        limit: seconds that a rank may be late inside a step; 0: for ever.
        hears_root: whether the heart of rank 0 can be heard on the other hosts too.
        hears: ranks on other hosts that `hear` is told of.
    """

    def __init__(
        self,
        ranks: Sequence[int],
        hosts: Sequence[str],
        board: Board,
        limit: float,
        hears_root: bool = False,
        hears: Sequence[int] = (),
    ) -> None:
        self.limit = limit
        self.step = 0
        self._ranks, self._hosts, self._board = tuple(ranks), tuple(hosts), board
        self._others = [i for i in range(len(ranks)) if i != board.rank]
        self._root_elsewhere = hears_root and 0 not in self._ranks
        self._waited = self._looked = 0.0
        self._ticks: dict[int, tuple[int, float]] = {}
        self._dead: dict[int, float] = {}
        self._asked = 0.0
        self._beats: list[int] = []
        self._far = dict.fromkeys(hears, 0)
        self._silent = [0.0] * (len(ranks) + 1 + len(hears))
        self._heard = 0.0

    # -- where this rank is ----------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Note that a step begins; every step begins with its plan."""
        self.step += 1
        self._board.note(self.step, 0, _CODES["plan"])

    def begin(self, kind: str) -> None:
        """Note that a collective begins, and that the time of waiting starts anew."""
        code = _CODES[kind]
        _, call, _ = self._board.where(self._board.rank)
        self._board.note(self.step, call + (code in _COUNTED), code)
        self.wait_anew()

    def wait_anew(self) -> None:
        """Note that the time of waiting starts anew, for a collective that native code has begun."""
        if self._ticks:
            self._ticks.clear()
        self._waited = self._looked = 0.0

    def native(self, kind: str) -> tuple[np.ndarray, int]:
        """Return where native code notes its collectives, `Board.place`, and what it notes for this kind."""
        return self._board.place, _CODES[kind]

    @property
    def where(self) -> str:
        """Where this rank is, in words."""
        return _place(*self._board.where(self._board.rank))

    # -- waiting inside a step -------------------------------------------------------------------------------------

    def late(self, late: Sequence[int]) -> None:
        """Look after ranks of this host (by their places on the board) that this rank waits for; call it often.

        Raises:
            JobError: one of them has died, or is late beyond the limit.
        """
        self._look()
        for i in late:
            ticks = self._board.ticks(i)
            if self._ticks.get(i, (-1, 0.0))[0] != ticks:
                self._ticks[i] = ticks, self._waited
        self._look_for_dead(late)
        if not self.limit or self._waited < self.limit:
            return
        culprits = [i for i in late if self._waited - self._ticks[i][1] > _WAITS]
        if culprits or self._waited > self.limit + _GRACE_BEHIND:
            raise self._error([self._stuck(i) for i in culprits or late])

    def late_elsewhere(self, late: Sequence[int]) -> None:
        """Look after ranks of the run, on any host, that this rank waits for over the network; call it often.

        Raises:
            JobError: they are late beyond the limit.
        """
        self._look()
        self._look_for_dead(self._others)
        if self.limit and self._waited > self.limit + _GRACE_NETWORK:
            names = [f"{self._name(rank)} has not come to {self.where} within {self.limit:g} s" for rank in late]
            raise self._error(names or [f"{self.where} has not ended within {self.limit:g} s"])

    def _look(self) -> None:
        now = time.monotonic()
        self._waited += min(now - self._looked, _LONGEST_NAP) if self._looked else 0.0
        self._looked = now
        self._board.tick()
        self._listen(now)

    # -- waiting between steps -------------------------------------------------------------------------------------

    def idle(self) -> None:
        """Look after the ranks of this host, and after rank 0, while there is nothing to do; call it now and then.

        Raises:
            JobError: one of them has died, or its process has stopped running for longer than the limit.
        """
        now = time.monotonic()
        self._listen(now)
        self._look_for_dead(self._others)
        if not self.limit:
            return
        silent = [self._stopped(self._ranks[i]) for i in self._others if self._silent[i] > self.limit]
        elsewhere = [0, *self._far] if self._root_elsewhere else [-1, *self._far]
        for rank, seconds in zip(elsewhere, self._silent[len(self._ranks) :], strict=True):
            if rank >= 0 and seconds > self.limit + _GRACE_NETWORK:
                silent.append(f"nothing has been heard of {self._name(rank)} for {self.limit:g} s")
        if silent:
            raise self._error(silent)

    def hear(self, rank: int) -> None:
        """Note that the heart of a rank on another host beats; any thread may call this."""
        self._far[rank] += 1

    def _listen(self, now: float) -> None:
        """Add up how long each heart has been silent, counting only time in which this rank ran itself."""
        if now - self._heard < BEAT:
            return
        passed = min(now - self._heard, _LONGEST_NAP) if self._heard else 0.0
        self._heard = now
        before, self._beats = self._beats, [*self._board.beats(), *self._far.values()]
        for i, beats in enumerate(self._beats):
            self._silent[i] = self._silent[i] + passed if before and before[i] == beats else 0.0

    def _look_for_dead(self, ranks: Sequence[int]) -> None:
        now = time.monotonic()
        if now - self._asked < BEAT:
            return
        self._asked = now
        self._dead = {i: self._dead.get(i, now) for i in self._board.dead(ranks)}
        gone = [i for i, since in self._dead.items() if now - since > _DEAD_FOR]
        if gone:
            raise self._error(
                [f"{self._name(self._ranks[i])} has died at {_place(*self._board.where(i))}" for i in gone]
            )

    # -- what is said ----------------------------------------------------------------------------------------------

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}"

    def _stuck(self, i: int) -> str:
        process = "its process has stopped" if self._silent[i] > 4 * BEAT else "its process runs"
        name = self._name(self._ranks[i])
        last = _place(*self._board.where(i))
        if last == self.where:
            return f"{name} has not got through {last} within {self.limit:g} s, and {process}"
        return f"{name} has not come to {self.where} within {self.limit:g} s: it was last at {last}, and {process}"

    def _stopped(self, rank: int) -> str:
        return f"the process of {self._name(rank)} has not run for {self.limit:g} s"

    def differs(self, i: int) -> JobError:
        """Return the error for a rank that has come with another collective or another size."""
        return self._error(
            [f"{self._name(self._ranks[i])} has come to {self.where} with something else: the ranks have diverged"]
        )

    def _error(self, reasons: Sequence[str]) -> JobError:
        """Return the error; only one rank of a host returns at once, the others when that one has not ended the job."""
        if not self._board.claim():
            time.sleep(2 * _DEAD_FOR)
        # Several hosts may find out at the same time.
        time.sleep(0.3 * list(dict.fromkeys(self._hosts)).index(self._hosts[self._ranks[self._board.rank]]))
        return JobError("; ".join(reasons) + (" (--timeout sets the limit)" if self.limit else ""))


def _place(step: int, call: int, kind: int) -> str:
    if kind == 0:
        return "the start"
    name = f"{_KINDS[kind]} {call}" if kind in _COUNTED else _KINDS[kind]
    return f"{name} of step {step}" if step else f"{name} before the first step"
