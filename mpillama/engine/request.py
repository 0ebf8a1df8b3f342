"""What is asked of the engine, and what it answers: plain data that any front end can make and read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UsageError

MAX_PRIORITY = 100
"""The largest and, negated, the smallest priority; a bound, so that no request can be put off for ever."""


class Constraint(Protocol):
    """Decides which tokens may come next (a grammar, a JSON schema). One object follows one text."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow it; the engine then ends it with "stop"."""
        ...

    def mask(self) -> np.ndarray | None:
        """Return the tokens that are allowed next, None if all are.

        bool (n_vocab,), or bits in int32 or uint32 (at least n_vocab / 32,) whose lowest bit is the first token. Tokens
        that end a generation must be allowed where the text may end.
        """
        ...

    def accept(self, token: int) -> None:
        """Advance by a token; not called for tokens that end the generation."""
        ...

    def fork(self) -> Constraint:
        """Return another object in the same state, for one more continuation of the same prompt."""
        ...


@dataclass(frozen=True)
class RequestParams:
    """How a prompt is to be continued, or that its embedding is wanted. Raises UsageError for a value out of range.

    Attributes:
        sampling: how tokens are chosen; continuation i of n uses ``seed + i`` unless the seed is random.
        max_tokens: tokens at most, the one that ends the text not counted; None: until the context is full. 0: the
            prompt is evaluated only.
        stop: strings that end the text, and are not part of it.
        stop_tokens: tokens that end the text like the model's own end-of-generation tokens, also with ``ignore_eos``.
        ignore_eos: the model's own end-of-generation tokens are never chosen.
        n: continuations wanted.
        best_of: continuations made, of which the ``n`` with the highest mean logprob are given out once all are ready.
        logprobs: alternatives to report for each token; 0: only the chosen token; None: no logprobs.
        prompt_logprobs: likewise for the tokens of the prompt, whose beginning is then not taken from the KV cache.
        priority: larger goes first; one level is worth `Engine.priority_seconds` of waiting.
        constraint: in the state before the first token; the engine forks it and never changes it.
        reasoning_budget: tokens of thinking before the engine closes it; -1: no limit.
        reasoning_tags: strings between which the model thinks.
        reasoning_lead: what the engine writes behind the second one, where it closes a thought.
        special: whether control tokens show as text.
        embedding: the prompt's embedding is wanted and nothing is generated.
        cache_prompt: whether KV blocks are shared with earlier and later requests that begin alike.
    """

    sampling: SamplingParams = field(default_factory=SamplingParams)
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] = frozenset()
    ignore_eos: bool = False
    n: int = 1
    best_of: int | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    priority: int = 0
    constraint: Constraint | None = None
    reasoning_budget: int = -1
    reasoning_tags: tuple[str, str] = ("<think>", "</think>")
    reasoning_lead: str = ""
    special: bool = False
    embedding: bool = False
    cache_prompt: bool = True

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise UsageError(f"max_tokens must be at least 0, got {self.max_tokens}")
        if self.n < 1:
            raise UsageError(f"n must be at least 1, got {self.n}")
        if self.best_of is not None and self.best_of < self.n:
            raise UsageError(f"best_of must be at least n ({self.n}), got {self.best_of}")
        for name in ("logprobs", "prompt_logprobs"):
            if (getattr(self, name) or 0) < 0:
                raise UsageError(f"{name} must be at least 0, got {getattr(self, name)}")
        if abs(self.priority) > MAX_PRIORITY:
            raise UsageError(f"priority must be between -{MAX_PRIORITY} and {MAX_PRIORITY}, got {self.priority}")
        if self.reasoning_budget < -1:
            raise UsageError(f"reasoning_budget must be at least 0, or -1 for no limit, got {self.reasoning_budget}")
        if self.embedding and self.n_branches > 1:
            raise UsageError("an embedding has no continuations: n and best_of must be 1")

    @property
    def n_branches(self) -> int:
        """Continuations that are made."""
        return self.best_of or self.n


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it.

    Attributes:
        id: different from those of all requests in the engine.
        prompt: token ids, at least one.
        arrival: in seconds of the engine's clock; None: when it is added.
    """

    id: str
    prompt: tuple[int, ...]
    params: RequestParams = field(default_factory=RequestParams)
    arrival: float | None = None


@dataclass(frozen=True)
class Logprob:
    """A token's logprob before any sampler, bias or constraint, and the likeliest tokens in its place, best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Usage:
    """Tokens of one continuation: of the prompt, of these found in the KV cache, and sampled (one that ends it too)."""

    n_prompt: int
    n_cached: int
    n_generated: int


@dataclass(frozen=True)
class Timings:
    """Seconds of one continuation.

    Attributes:
        queued: from arrival until the prompt was begun.
        prompt: from then until its last token was evaluated.
        decode: from then until the end; ``sample`` of these were spent choosing tokens.
        ttft: from arrival to the first token.
    """

    queued: float = 0.0
    prompt: float = 0.0
    decode: float = 0.0
    sample: float = 0.0
    ttft: float = 0.0


@dataclass
class Output:
    """What one step has added to one continuation of a request.

    Attributes:
        index: which of the ``n`` continuations.
        text: new characters; they may lag behind the tokens where a character or a stop string may be under way.
        tokens: new ids, without one that ended the text.
        logprobs: of these ids, if asked for.
        prompt_logprobs: if asked for, with the first output of each continuation; None for the first token, which
            nothing predicts.
        finish_reason: None while it goes on; ``stop``, ``length``, ``cancelled`` or ``error``.
        stop_reason: the stop string or token that was found; None for the model's own end; with ``length``,
            ``context`` if the context was full; with ``error``, the message.
        last: whether nothing more follows of the whole request.
        usage: with a finish_reason.
        embedding: float32 (n_embd,) of length 1, with a finish_reason.
        timings: with a finish_reason.
    """

    request_id: str
    index: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    prompt_logprobs: list[Logprob | None] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    last: bool = False
    usage: Usage | None = None
    embedding: np.ndarray | None = None
    timings: Timings | None = None
