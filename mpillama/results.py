"""What `mpillama.LLM` is asked, and what it answers: plain data, the same on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from mpillama.engine.request import Logprob, Timings, Usage

__all__ = ["Choice", "Completion", "GenerationParams", "Logprob", "Piece", "Timings", "ToolCall", "Usage"]


@dataclass(frozen=True)
class GenerationParams:
    """How a text is to be continued; None leaves llama.cpp's default. The names are those of OpenAI's and its API.

    Values are checked when a request is made of them.

    Attributes:
        max_tokens: tokens at most; None: until the model ends the text or the context is full.
        temperature: 0 takes the likeliest token each time.
        seed: of the random numbers; None: a random one. Continuation i of n uses ``seed + i``.
        stop: strings that end the text, and are not part of it.
        n: continuations of each prompt.
        best_of: continuations made, of which the likeliest ``n`` are returned.
        logprobs: alternatives to report for each token; 0: only the chosen token.
        logit_bias: by token id; -inf forbids a token.
        ignore_eos: go on where the model would end.
        samplers: in their order, by llama.cpp's names.
        json_schema: the text is JSON of this schema; ``{}``: any JSON.
        grammar: the text follows this GBNF grammar.
        regex: the text matches this regular expression.
        reasoning_budget: tokens of thinking at most.
        tools: functions that the model may call, as OpenAI describes them (`LLM.chat` only).
        extra: any other field of `mpillama serve`'s API, e.g. ``chat_template_kwargs``.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    top_n_sigma: float | None = None
    xtc_probability: float | None = None
    xtc_threshold: float | None = None
    dynatemp_range: float | None = None
    dynatemp_exponent: float | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    dry_multiplier: float | None = None
    dry_base: float | None = None
    dry_allowed_length: int | None = None
    dry_penalty_last_n: int | None = None
    mirostat: int | None = None
    mirostat_tau: float | None = None
    mirostat_eta: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    n: int | None = None
    best_of: int | None = None
    logprobs: int | None = None
    logit_bias: Mapping[int, float] | None = None
    ignore_eos: bool | None = None
    samplers: Sequence[str] | None = None
    json_schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    regex: str | None = None
    reasoning_budget: int | None = None
    tools: Sequence[Mapping[str, Any]] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the fields that are set, as in the JSON of a request."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"}
        body = {name: value for name, value in given.items() if value is not None}
        for name in ("stop", "samplers", "tools"):
            if name in body and not isinstance(body[name], str):
                body[name] = list(body[name])
        if self.logit_bias is not None:
            body["logit_bias"] = [[token, bias] for token, bias in self.logit_bias.items()]
        return {**body, **self.extra}


@dataclass(frozen=True)
class ToolCall:
    """A function that the model wants called; ``arguments`` is JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Choice:
    """One continuation of a prompt, or one answer.

    Attributes:
        text: without what ended it, and without the thought before it.
        tokens: ids, those of a thought included.
        finish_reason: ``stop``, ``length``, ``tool_calls`` or ``error``.
        stop_reason: the stop string or token that was found; with ``length``, ``context`` if the context was full; with
            ``error``, what is wrong.
        logprobs: one for each token, if asked for.
        reasoning: what the model thought before it answered (`LLM.chat` only).
        tool_calls: likewise.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: str
    stop_reason: str | int | None = None
    logprobs: tuple[Logprob, ...] = ()
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True)
class Completion:
    """What has become of one prompt or conversation.

    Attributes:
        prompt: ids, as the model got them.
        choices: the ``n`` continuations; the properties speak of the first.
        usage: tokens of all choices together.
        timings: of the choice that ended last.
    """

    prompt: tuple[int, ...]
    choices: tuple[Choice, ...]
    usage: Usage
    timings: Timings

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return self.choices[0].text

    @property
    def tokens(self) -> tuple[int, ...]:
        """The ids of the first choice."""
        return self.choices[0].tokens

    @property
    def finish_reason(self) -> str:
        """Why the first choice ended."""
        return self.choices[0].finish_reason

    @property
    def message(self) -> dict[str, Any]:
        """The first choice as a message, to be appended to a conversation."""
        choice = self.choices[0]
        message: dict[str, Any] = {"role": "assistant", "content": choice.text}
        if choice.reasoning:
            message["reasoning_content"] = choice.reasoning
        if choice.tool_calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in choice.tool_calls
            ]
        return message


@dataclass(frozen=True)
class Piece:
    """What a step has added to one choice of a stream.

    Attributes:
        text: new characters; they may lag behind the tokens.
        tokens: new ids.
        index: of the choice.
        reasoning: new characters of a thought, in a chat.
        finish_reason: with the last piece of a choice, see `Choice`.
        stop_reason: likewise.
    """

    text: str
    tokens: tuple[int, ...] = ()
    index: int = 0
    reasoning: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
