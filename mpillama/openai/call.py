"""A request of a client from its JSON to its answer, independent of how the two travel."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from typing import Any

from mpillama.engine.request import Logprob, Output, Request, RequestParams, Timings, Usage
from mpillama.openai.context import Context
from mpillama.openai.errors import ApiError
from mpillama.openai.fields import Fields
from mpillama.tokenizer.base import Tokenizer

Chunk = dict[str, Any]


class Call(ABC):
    """One call of the API: gives the engine `requests`, takes their outputs, and makes the answer.

    Whoever drives it adds ``requests`` to an engine, passes each output of these to `push`, and when `done` takes
    `response`; or, if ``stream`` is true, sends each chunk that `push` returns as it comes, framed by `frame`, and
    ``tail`` at the end. Once there is an ``error`` nothing else will come of it, and its requests may be cancelled.

    Attributes:
        id: of the answer.
        requests: for the engine.
        stream: whether the client wants chunks.
        wanted_slot: of the server's slots, the one that the client would like; -1: any.
        slot: the one that it has got; -1: none, or not yet.
        error: what has gone wrong in the engine; `response` raises it.
        tail: what ends a stream.
    """

    prefix = ""
    tail = b"data: [DONE]\n\n"

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        self.context, self.fields = context, fields
        self.id = id or self.prefix + context.new_id()
        self.created = int(context.clock())
        self.model = context.name
        self.stream = fields.boolean("stream")
        self.wanted_slot, self.slot = fields.integer("id_slot", -1, -1), -1
        self.requests: tuple[Request, ...] = ()
        self.usages: list[Usage] = []
        self.timings: Timings | None = None
        self.error: ApiError | None = None
        self._numbers: dict[str, int] = {}
        self._open: set[str] = set()
        self._prompts_cached: dict[str, tuple[int, int]] = {}
        self._clock = _Clock() if self.stream and fields.boolean("timings_per_token") else None

    def add_requests(self, prompts: list[tuple[int, ...]], params: RequestParams) -> None:
        """Make a request of each prompt."""
        ids = [self.id if len(prompts) == 1 else f"{self.id}-{i}" for i in range(len(prompts))]
        self.requests = tuple(Request(id_, prompt, params) for id_, prompt in zip(ids, prompts, strict=True))
        self._numbers = {id_: i for i, id_ in enumerate(ids)}
        self._open = set(ids)

    def push(self, output: Output) -> list[Chunk]:
        """Take an output of the engine; returns the chunks that it is worth."""
        if output.finish_reason == "error":
            self.error = self.error or ApiError(500, str(output.stop_reason))
        elif output.finish_reason == "cancelled":
            self.error = self.error or ApiError(503, "the request was cancelled before its end")
        if output.usage is not None:
            self.usages.append(output.usage)
            self._prompts_cached.setdefault(output.request_id, (output.usage.n_prompt, output.usage.n_cached))
        if output.timings is not None:
            self.timings = output.timings
        if output.last:
            self._open.discard(output.request_id)
        if self.error is not None:
            return []
        number = self._numbers[output.request_id] * self.requests[0].params.n + output.index
        chunks = self.take(number, output)
        if self._clock is not None:
            self._clock.count(len(output.tokens))
            for chunk in chunks:
                chunk.setdefault("timings", timings_json(*self._clock.read(self.n_prompt)))
        return chunks

    @property
    def done(self) -> bool:
        """Whether all outputs have come."""
        return not self._open

    @abstractmethod
    def take(self, choice: int, output: Output) -> list[Chunk]:
        """Take an output of one choice; returns chunks."""

    def response(self) -> Any:
        """Return the whole answer, when `done`.

        Raises:
            ApiError: a request has failed, or was cancelled.
        """
        if self.error is not None:
            raise self.error
        return self.answer()

    @abstractmethod
    def answer(self) -> Any:
        """Return the whole answer."""

    def frame(self, chunk: Chunk) -> bytes:
        """Return a chunk as a server-sent event."""
        return b"data: " + to_json(chunk) + b"\n\n"

    # -- parts of answers ------------------------------------------------------------------------------------------

    @property
    def n_prompt(self) -> int:
        """Tokens of all prompts."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def n_generated(self) -> int:
        """Tokens that were generated."""
        return sum(usage.n_generated for usage in self.usages)

    @property
    def n_cached(self) -> int:
        """Tokens of the prompts that were in the KV cache already."""
        return sum(n_cached for _, n_cached in self._prompts_cached.values())

    def usage(self) -> dict[str, Any]:
        """Return OpenAI's usage."""
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
            "prompt_tokens_details": {"cached_tokens": self.n_cached},
        }

    def timings_json(self) -> dict[str, Any]:
        """Return llama.cpp's timings, of the last continuation that ended; in milliseconds."""
        return timings_json(self.usages[-1] if self.usages else Usage(0, 0, 0), self.timings or Timings())


class _Clock:
    """Times a stream while it runs: the engine tells its own times at the end only.

    The wait in the queue counts as time of the prompt, and nothing of it as found in the cache.
    """

    def __init__(self) -> None:
        self._began, self._first, self._n = time.monotonic(), 0.0, 0

    def count(self, n: int) -> None:
        """Note that so many tokens have come."""
        self._first = self._first or time.monotonic()
        self._n += n

    def read(self, n_prompt: int) -> tuple[Usage, Timings]:
        """Return what has passed so far."""
        times = Timings(prompt=self._first - self._began, decode=time.monotonic() - self._first)
        return Usage(n_prompt, 0, self._n), times


def timings_json(usage: Usage, timings: Timings) -> dict[str, Any]:
    """Return tokens and seconds as llama.cpp shows them, in milliseconds."""
    n_prompt, n = usage.n_prompt - usage.n_cached, usage.n_generated
    return {
        "cache_n": usage.n_cached,
        "prompt_n": n_prompt,
        "prompt_ms": 1e3 * timings.prompt,
        "prompt_per_token_ms": 1e3 * timings.prompt / max(n_prompt, 1),
        "prompt_per_second": n_prompt / max(timings.prompt, 1e-9),
        "predicted_n": n,
        "predicted_ms": 1e3 * timings.decode,
        "predicted_per_token_ms": 1e3 * timings.decode / max(n, 1),
        "predicted_per_second": n / max(timings.decode, 1e-9),
        "queued_ms": 1e3 * timings.queued,
    }


def to_json(value: Any) -> bytes:
    """Return UTF-8 JSON; half a surrogate pair, which has no UTF-8, stays an escape."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace")


def json_logprob(tokenizer: Tokenizer, logprob: Logprob) -> dict[str, Any]:
    """Return a token's logprob as OpenAI's chat API has it."""
    return {
        **_one(tokenizer, logprob.token, logprob.logprob),
        "top_logprobs": [_one(tokenizer, token, value) for token, value in logprob.top],
    }


def _one(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes(token, special=True) if token < tokenizer.n_vocab else b""
    return {
        "id": token,
        "token": data.decode(errors="replace"),
        "bytes": list(data),
        # JSON has no infinity; this is OpenAI's number for it.
        "logprob": max(logprob, -9999.0),
    }
