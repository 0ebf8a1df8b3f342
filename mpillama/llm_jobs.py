"""Rank 0's side of `mpillama.LLM`: prompts to requests of the engine, and its outputs to results."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from mpillama.engine.base import EngineLike
from mpillama.engine.request import Logprob, Output, Request, RequestParams, Timings, Usage
from mpillama.errors import UserError
from mpillama.openai.chat import ChatCall
from mpillama.openai.completions import CompletionCall
from mpillama.openai.context import Context
from mpillama.openai.fields import Fields
from mpillama.results import Choice, Completion, GenerationParams, Piece, ToolCall


class Job(Protocol):
    """Something that the engine works on."""

    requests: tuple[Request, ...]

    def push(self, output: Output) -> None:
        """Take an output of one of the requests."""
        ...


class TextJob:
    """A prompt that is continued, or a conversation that is answered.

    Args:
        context: the model.
        prompt: a text, token ids, or the messages of a conversation.
        params: how.
        chat: whether it is a conversation.

    Raises:
        UserError: the model cannot take it.
    """

    def __init__(self, context: Context, prompt: Any, params: GenerationParams, chat: bool) -> None:
        body = plain(params.body())
        self._nothing = body.get("max_tokens") == 0
        self._call: ChatCall | CompletionCall
        if chat:
            if body.get("logprobs") is not None:
                body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
            self._call = ChatCall(context, Fields({**body, "messages": plain(prompt)}))
        else:
            self._call = CompletionCall(context, Fields({**body, "prompt": plain(prompt)}))
        self.requests = self._call.requests
        n = self.requests[0].params.n
        self._tokens: list[list[int]] = [[] for _ in range(n)]
        self._logprobs: list[list[Logprob]] = [[] for _ in range(n)]
        self._ends: list[tuple[str, str | int | None]] = [("cancelled", None)] * n
        self._pieces: list[Piece] = []
        self.done = False

    def push(self, output: Output) -> None:
        """Take an output; `take_pieces` then has what it is worth."""
        i = output.index
        text, thought = self._said(i)
        self._call.push(output)
        now, thought_now = self._said(i)
        tokens = () if self._nothing else tuple(output.tokens)
        self._tokens[i] += tokens
        self._logprobs[i] += output.logprobs
        reason = output.finish_reason
        if reason is not None:
            if reason != "error":
                reason = self._call.choices[i].finish_reason or reason
            self._ends[i] = (reason, output.stop_reason)
        self.done = output.last
        self._pieces.append(Piece(now[len(text) :], tokens, i, thought_now[len(thought) :], reason, output.stop_reason))

    def _said(self, choice: int) -> tuple[str, str]:
        if isinstance(self._call, ChatCall):
            return self._call.choices[choice].content, self._call.choices[choice].thought
        return self._call.choices[choice].text, ""

    def take_pieces(self) -> list[Piece]:
        """Return what has come since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def completion(self) -> Completion:
        """Return the result, when `done`."""
        choices = []
        for i, (reason, stop_reason) in enumerate(self._ends):
            text, thought = self._said(i)
            calls = self._call.choices[i].tool_calls if isinstance(self._call, ChatCall) else []
            choices.append(
                Choice(
                    text,
                    tuple(self._tokens[i]),
                    reason,
                    stop_reason,
                    tuple(self._logprobs[i]),
                    thought,
                    tuple(ToolCall(call.name, call.arguments) for call in calls),
                )
            )
        call = self._call
        usage = Usage(call.n_prompt, call.n_cached, call.n_generated)
        return Completion(self.requests[0].prompt, tuple(choices), usage, call.timings or Timings())


class EmbeddingJob:
    """Texts, or lists of token ids, whose embeddings are wanted; UserError if the model cannot take one."""

    def __init__(self, context: Context, texts: Any) -> None:
        texts = plain(texts)
        prompts = context.prompts(texts, "texts", generates=False, most=max(2048, len(texts))) if texts else []
        head = secrets.token_hex(8)
        self._numbers = {f"{head}-{i}": i for i in range(len(prompts))}
        params = RequestParams(embedding=True)
        self.requests = tuple(Request(id_, prompts[i], params) for id_, i in self._numbers.items())
        self._vectors: list[np.ndarray | None] = [None] * len(prompts)

    def push(self, output: Output) -> None:
        """Take an output."""
        if output.finish_reason == "error":
            raise UserError(str(output.stop_reason))
        self._vectors[self._numbers[output.request_id]] = output.embedding

    def vectors(self, n_embd: int) -> np.ndarray:
        """Return float32 (texts, n_embd), when the engine is through."""
        return np.array([vector for vector in self._vectors if vector is not None], np.float32).reshape(-1, n_embd)


class Desk:
    """Hands requests of jobs to an engine, and its outputs to the jobs.

    Args:
        engine: whose only user this is.

    Attributes:
        stepping: whether the engine is in a step, or has failed in one.
    """

    def __init__(self, engine: EngineLike) -> None:
        self._engine = engine
        self._jobs: dict[str, Job] = {}
        self.stepping = False

    def add(self, jobs: Iterable[Job]) -> None:
        """Let jobs begin: all, or with a UserError none."""
        owners = [(request, job) for job in jobs for request in job.requests]
        self._engine.add_all([request for request, _ in owners])
        self._jobs |= {request.id: job for request, job in owners}

    def step(self) -> None:
        """Run a step of all jobs."""
        self.stepping = True
        outputs = self._engine.step()
        self.stepping = False
        for output in outputs:
            job = self._jobs[output.request_id]
            if output.last:
                del self._jobs[output.request_id]
            job.push(output)

    def run(self, jobs: Sequence[Job]) -> None:
        """Run until these jobs are done; others may go on meanwhile."""
        self.add(jobs)
        ids = [request.id for job in jobs for request in job.requests]
        try:
            while any(id_ in self._jobs for id_ in ids):
                self.step()
        finally:
            self._cancel(request for job in jobs for request in job.requests)

    def drop(self, job: Job) -> None:
        """Forget a job that nobody waits for."""
        self._cancel(job.requests)

    def _cancel(self, requests: Iterable[Request]) -> None:
        for request in requests:
            if self._jobs.pop(request.id, None) is not None:
                self._engine.cancel(request.id)


def plain(value: Any) -> Any:
    """Return a value as JSON has it: tuples become lists, NumPy's numbers and arrays Python's."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
