"""The step loop: rank 0 says what is run, all ranks run it."""

from __future__ import annotations

import zlib
from collections import deque
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np

from mpillama.backends.base import Batch
from mpillama.comm.base import Arrival, Team, attempt, check_agreement, name_of
from mpillama.errors import UserError
from mpillama.runner import Runner, pack, unpack

# Steps between two comparisons of what the ranks have been told and what they have computed.
_AGREE_EVERY = 64


# What a message says that is no batch, whose first number counts tokens.
_STOP, _TASK = -1, -2

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """Something for every rank to do; it travels pickled."""

    def __call__(self, world: Team, runner: Runner) -> T_co:
        """Do it; a UserError ends the task, not the run."""
        ...


class Leader:
    """Rank 0's side of the step loop: runs batches on all ranks.

    Args:
        world: the ranks of one replica of the model.
        runner: of rank 0.
        max_in_flight: batches whose logits may be under way at a time; a pipeline of n stages is busy with n.
    """

    def __init__(self, world: Team, runner: Runner, max_in_flight: int = 1) -> None:
        self._world, self._runner = world, runner
        self.max_in_flight = max_in_flight
        # For greedy sampling, for the default of 40, and for most else. Each comes to steps of another shape, which are
        # recorded by themselves. Of a small vocabulary all logits are as cheap.
        self.n_tops: tuple[int, ...] = (1, 64, 128) if runner.cfg.n_vocab >= 1024 else ()
        self._in_flight: deque[Arrival] = deque()

    @property
    def in_flight(self) -> int:
        """Batches that are submitted and not collected."""
        return len(self._in_flight)

    def submit(self, batch: Batch) -> None:
        """Begin a batch on all ranks; batches end in the order in which they began.

        Returns as soon as rank 0's own stage is through with it.
        """
        if len(self._in_flight) >= self.max_in_flight:
            raise AssertionError(f"{len(self._in_flight)} batches are in flight; collect one before the next")
        self._world.watch.begin_step()
        message = pack(batch)
        self._world.send(message)
        self._in_flight.append(_begin(self._world, self._runner, message, batch))

    def collect(self) -> np.ndarray:
        """Return the logits of the batch that began first, see `Runner.run`; one without logits is not waited for."""
        return self._in_flight.popleft().wait()

    def run(self, batch: Batch) -> np.ndarray:
        """Return the logits (L, n_vocab) of a batch, when no other is in flight."""
        if self._in_flight:
            raise AssertionError("collect what is in flight before running a batch")
        self.submit(batch)
        return self.collect()

    def everywhere(self, task: Task[T]) -> list[T]:
        """Run a task on all ranks between two steps, and return what it returns on each.

        Raises:
            UserError: the first that a rank has raised; all ranks go on.
        """
        if self._in_flight:
            raise AssertionError("collect what is in flight before running a task")
        self._world.send(np.array([_TASK, 0], np.int32))
        self._world.bcast(task)
        outcomes = self._world.gather(attempt(partial(task, self._world, self._runner)))
        for rank, outcome in enumerate(outcomes):
            if isinstance(outcome, UserError):
                where = f"{name_of(self._world, rank)}: " if self._world.size > 1 else ""
                raise UserError(where + outcome.line)
        return outcomes

    def stop(self, exit_code: int = 0) -> None:
        """End the loop of the others, who then return ``exit_code``, after what is in flight."""
        while self._in_flight:
            self.collect()
        self._world.send(np.array([_STOP, exit_code], np.int32))


def follow(world: Team, runner: Runner) -> int:
    """The other ranks' side: run what rank 0 says until it says stop; returns the exit code it gives."""
    while True:
        message = world.receive()
        if message[0] == _STOP:
            return int(message[1])
        if message[0] == _TASK:
            task: Task[Any] = world.bcast(None)
            world.gather(attempt(partial(task, world, runner)))
            continue
        world.watch.begin_step()
        _begin(world, runner, message, unpack(message))


def _begin(world: Team, runner: Runner, message: np.ndarray, batch: Batch) -> Arrival:
    """Begin a batch; at the first step, and at every so many, all ranks compare the plan and what they computed.

    In a pipeline only the plan, and before they begin: whoever has to wait for the last stage's result would hold up
    the stages before it.
    """
    compares = world.size > 1 and world.watch.step % _AGREE_EVERY == 1
    plan = zlib.crc32(message.tobytes()) << 32
    if compares and not runner.has_all_blocks:
        check_agreement(world, plan ^ world.watch.step)
    logits = runner.begin(batch)
    if compares and runner.has_all_blocks:
        signature = zlib.crc32(np.ascontiguousarray(logits.wait()[-1:]).tobytes())
        check_agreement(world, plan | signature ^ world.watch.step)
    return logits
