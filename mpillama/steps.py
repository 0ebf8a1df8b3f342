"""The step loop: rank 0 says what is run, all ranks run it."""

from __future__ import annotations

import zlib
from collections import deque

import numpy as np

from mpillama.backends.base import Batch
from mpillama.comm.base import Arrival, World, check_agreement
from mpillama.runner import Runner, pack, unpack

# Steps between two comparisons of what the ranks have been told and what they have computed.
_AGREE_EVERY = 64


class Leader:
    """Rank 0's side of the step loop: runs batches on all ranks.

    Args:
        world: of all ranks.
        runner: of rank 0.
        max_in_flight: batches whose logits may be under way at a time; a pipeline of n stages is busy with n.
    """

    def __init__(self, world: World, runner: Runner, max_in_flight: int = 1) -> None:
        self._world, self._runner = world, runner
        self.max_in_flight = max_in_flight
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
        """Return the logits (L, n_vocab) of the batch that began first; one without logits is not waited for."""
        return self._in_flight.popleft().wait()

    def run(self, batch: Batch) -> np.ndarray:
        """Return the logits (L, n_vocab) of a batch, when no other is in flight."""
        if self._in_flight:
            raise AssertionError("collect what is in flight before running a batch")
        self.submit(batch)
        return self.collect()

    def stop(self, exit_code: int = 0) -> None:
        """End the loop of the others, who then return ``exit_code``."""
        import numpy as np

        self._world.send(np.array([-1, exit_code], np.int32))


def follow(world: World, runner: Runner) -> int:
    """The other ranks' side: run what rank 0 says until it says stop; returns the exit code it gives."""

    while True:
        message = world.receive()
        if message[0] < 0:
            return int(message[1])
        world.watch.begin_step()
        _begin(world, runner, message, unpack(message))


def _begin(world: World, runner: Runner, message: np.ndarray, batch: Batch) -> Arrival:
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
