"""What an engine runs batches with, and what is under way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mpillama.backends.base import Batch
from mpillama.engine.scheduler import Plan


class Executor(Protocol):
    """Runs batches on all ranks, in the order in which they are submitted.

    Attributes:
        max_in_flight: batches that may be submitted and not collected.
        n_tops: how many of the largest logits a batch may ask for, in ascending order; none: it has to take all.
    """

    max_in_flight: int
    n_tops: tuple[int, ...]

    def submit(self, batch: Batch) -> None:
        """Begin a batch."""
        ...

    def collect(self) -> np.ndarray:
        """Return the logits of the batch that began first, or hidden states if it asked for these."""
        ...


class OneByOne:
    """A function that runs a batch, as an executor."""

    max_in_flight = 1
    n_tops: tuple[int, ...] = ()

    def __init__(self, run: Callable[[Batch], np.ndarray]) -> None:
        self._run = run
        self._result = np.zeros(0, np.float32)

    def submit(self, batch: Batch) -> None:
        """Run a batch."""
        self._result = self._run(batch)

    def collect(self) -> np.ndarray:
        """Return its result."""
        return self._result


@dataclass(frozen=True)
class Flight:
    """A step that has been submitted.

    Attributes:
        plan: of the step.
        starts: tokens of each part's branch that were computed before.
        ends: whether each part is the last of what its branch had, so that a next token is wanted.
        n_top: how many of the largest logits come of each row, 0: all.
    """

    plan: Plan
    starts: tuple[int, ...]
    ends: tuple[bool, ...]
    n_top: int
