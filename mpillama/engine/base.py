"""What every engine has: its methods, for whoever brings requests, and its numbers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from mpillama.engine.request import Output, Request
from mpillama.errors import UserError


@dataclass
class Counters:
    """What has happened since the engine was made.

    Attributes:
        requests: added; ``finished`` and ``cancelled`` of them have left.
        prompt_tokens: evaluated, those again after a preemption included; ``cached_tokens`` were found in the KV cache.
        generated_tokens: sampled.
        preemptions: sequences sent back to wait because the KV cache was full.
        copied_blocks: for n > 1.
        steps: with ``step_seconds`` in all, of these ``run_seconds`` in the model and ``sample_seconds`` sampling.
    """

    requests: int = 0
    finished: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    copied_blocks: int = 0
    steps: int = 0
    step_seconds: float = 0.0
    run_seconds: float = 0.0
    sample_seconds: float = 0.0


@dataclass
class Stats(Counters):
    """The counters, and how things stand.

    Attributes:
        waiting: sequences that wait for their turn, or for blocks.
        running: sequences that take part in steps.
        kv_blocks: in all; ``kv_used`` by sequences, ``kv_cached`` by nobody but kept for prompts that begin alike.
    """

    waiting: int = 0
    running: int = 0
    kv_blocks: int = 0
    kv_used: int = 0
    kv_cached: int = 0


class EngineLike(ABC):
    """What runs requests: an `Engine`, or several behind one that hands out.

    Attributes:
        n_ctx: tokens of one sequence at most.
        n_parallel: sequences of one request at most.
        n_places: sequences at a time.
    """

    n_ctx: int
    n_parallel: int
    n_places: int

    @abstractmethod
    def add(self, request: Request) -> None:
        """Take a request in; UserError if it can never be run."""

    def add_all(self, requests: Sequence[Request]) -> None:
        """Take requests in: all of them, or with an error none.

        Raises:
            UserError: as `add` does.
        """
        for i, request in enumerate(requests):
            try:
                self.add(request)
            except UserError:
                for added in requests[:i]:
                    self.cancel(added.id)
                raise

    @abstractmethod
    def cancel(self, request_id: str) -> object:
        """Drop a request, if it is there."""

    @abstractmethod
    def has_work(self) -> bool:
        """Whether there is anything to do in a step."""

    @abstractmethod
    def step(self) -> list[Output]:
        """Go on for a while, and return what has been added to continuations; UserError if it cannot go on."""

    @abstractmethod
    def stats(self) -> Stats:
        """Return the counters, and how things stand."""
