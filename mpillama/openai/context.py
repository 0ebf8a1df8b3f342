"""What requests are read against: the model, and how the server was started."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpillama.chat import ChatTemplate
from mpillama.engine.sampling.params import SamplingParams
from mpillama.openai.constraints import Grammars
from mpillama.openai.errors import bad
from mpillama.openai.reasoning import HARMONY_TAGS
from mpillama.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class Context:
    """The model's side of a request; may be used by several threads.

    Attributes:
        name: of the model, as clients see it.
        tokenizer: of the model.
        template: chat template; None: there is no chat.
        n_vocab: of the logits.
        n_ctx: tokens of one sequence at most.
        n_parallel: sequences at a time, and so the most continuations of one request.
        sampling: what holds where a request says nothing.
        ignore_eos: the same.
        n_predict: tokens of an answer at most where a request says nothing; -1: no limit.
        reasoning_tags: strings between which the model thinks.
        reasoning_budget: tokens of thinking in a chat where a request says nothing; -1: no limit.
        template_kwargs: variables of the chat template where a request does not set them.
        grammars: compiler of constraints.
        new_id: makes the random part of an answer's id.
        clock: seconds since 1970.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    n_vocab: int
    n_ctx: int
    n_parallel: int
    sampling: SamplingParams = field(default_factory=SamplingParams)
    ignore_eos: bool = False
    n_predict: int = -1
    reasoning_tags: tuple[str, str] = ("<think>", "</think>")
    reasoning_budget: int = -1
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    grammars: Grammars = field(init=False)
    new_id: Callable[[], str] = lambda: secrets.token_hex(12)
    clock: Callable[[], float] = time.time

    def __post_init__(self) -> None:
        object.__setattr__(self, "grammars", Grammars(self.tokenizer, self.n_vocab))
        if self.harmony:
            object.__setattr__(self, "reasoning_tags", HARMONY_TAGS)

    @property
    def harmony(self) -> bool:
        """Whether the model speaks OpenAI's harmony format: its template says so, whatever its architecture is."""
        return self.template is not None and "<|channel|>" in self.template.source

    def is_control(self, text: str) -> bool:
        """Whether a text is one control token, which shows in an answer only if control tokens are asked for."""
        ids = self.tokenizer.encode(text, add_special=False)
        return len(ids) == 1 and not self.tokenizer.token_bytes(ids[0])

    def check_prompt(self, prompt: Sequence[int], param: str, generates: bool = True) -> tuple[int, ...]:
        """Return a prompt that the engine can take: an empty one becomes the token that begins a text.

        Raises:
            ApiError: it is too long, or has tokens that are not in the vocabulary.
        """
        if not prompt:
            if self.tokenizer.bos_id is None:
                raise bad(f"{param} is empty, and the model has no token to begin with", param)
            prompt = [self.tokenizer.bos_id]
        room = self.n_ctx - generates
        if len(prompt) > room:
            raise bad(
                f"{param} has {len(prompt)} tokens, but the context holds {self.n_ctx}; shorten it, or start the "
                "server with a larger -c",
                param,
                "context_length_exceeded",
            )
        wrong = next((token for token in prompt if not 0 <= token < self.n_vocab), None)
        if wrong is not None:
            raise bad(f"{param}: token {wrong} is not in the vocabulary of {self.n_vocab}", param)
        return tuple(prompt)

    def prompts(self, value: Any, param: str, generates: bool = True, most: int = 2048) -> list[tuple[int, ...]]:
        """Read one or several prompts: a string, token ids, or an array of either.

        Raises:
            ApiError: it is something else, too long, or there are more than ``most``.
        """
        if isinstance(value, str) or (isinstance(value, list) and value and all(_is_id(item) for item in value)):
            value = [value]
        if not isinstance(value, list) or not value:
            raise bad(f"{param} must be a string, an array of token ids, or an array of these", param)
        if len(value) > most:
            raise bad(f"{param} holds {len(value)} prompts; at most {most} are accepted", param)
        return [self.check_prompt(self._encode(item, param), param, generates) for item in value]

    def _encode(self, item: Any, param: str) -> list[int]:
        if isinstance(item, str):
            return self.encode(item, param)
        if isinstance(item, list) and all(_is_id(id_) for id_ in item):
            return item
        raise bad(f"{param} must be a string, an array of token ids, or an array of these", param)

    def encode(self, text: str, param: str) -> list[int]:
        """Return the ids of a text; ApiError before much work if it can never fit into the context."""
        # A token stands for less than this, but for runs of one character.
        longest = 256 * self.n_ctx
        if len(text) > longest:
            raise bad(
                f"{param} has {len(text)} characters, far more than a context of {self.n_ctx} tokens holds",
                param,
                "context_length_exceeded",
            )
        return self.tokenizer.encode(text)


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
