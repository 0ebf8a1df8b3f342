"""`/v1/completions`, and llama.cpp's own `/completion`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from mpillama.engine.request import Logprob, Output, RequestParams
from mpillama.openai.call import Call, Chunk, json_logprob
from mpillama.openai.context import Context
from mpillama.openai.errors import bad
from mpillama.openai.fields import Fields
from mpillama.openai.sampling import (
    MAX_LOGPROBS,
    asks_for_nothing,
    limit_json,
    params_json,
    read_constraint,
    read_params,
)


@dataclass
class _Choice:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    offset: int = 0
    # Of the tokens, those that chunks have held.
    n_shown: int = 0


class CompletionCall(Call):
    """Continues prompts as they are."""

    prefix = "cmpl-"

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        if fields.has("suffix") and fields.string("suffix"):
            raise bad("suffix is not supported: put what comes before and after into the prompt", "suffix")
        self._echo = fields.boolean("echo")
        self._n_logprobs = self._read_logprobs()
        if self._echo and self._n_logprobs is not None:
            raise bad("echo together with logprobs is not supported: prompts have no logprobs here", "echo")
        self._usage_wanted = fields.object("stream_options").boolean("include_usage")
        prompts = context.prompts(fields.any("prompt"), "prompt")
        params = read_params(context, fields, logprobs=self._n_logprobs, constraint=read_constraint(context, fields))
        self._nothing = asks_for_nothing(fields)
        if self._nothing:
            params = dataclasses.replace(params, n=1, best_of=None, logprobs=None, stop=())
        self.add_requests(prompts, params)
        self.choices = [_Choice() for _ in range(len(prompts) * params.n)]
        self._texts = [self._shown(prompt) for prompt in prompts] if self._echo else [""] * len(prompts)

    def _read_logprobs(self) -> int | None:
        fields = self.fields
        name = fields.first("logprobs", "n_probs")
        if isinstance(fields.any(name), bool):
            return 0 if fields.any(name) else None
        if not fields.has(name) or (name == "n_probs" and fields.any(name) == 0):
            return None
        return fields.integer(name, 0, low=0, high=MAX_LOGPROBS)

    def _shown(self, prompt: tuple[int, ...]) -> str:
        return self.context.tokenizer.decode(prompt)

    def take(self, choice: int, output: Output) -> list[Chunk]:
        """Add to a choice; a chunk waits until there is text to show."""
        state = self.choices[choice]
        text = output.text
        if self._nothing:
            text = ""
        else:
            state.tokens += output.tokens
        first = not state.text and not state.offset
        if first:
            text = self._texts[choice // self.requests[0].params.n] + text
        state.text += text
        state.logprobs += output.logprobs
        if output.finish_reason:
            state.finish_reason = "length" if self._nothing else output.finish_reason
            state.stop_reason = output.stop_reason
        if not self.stream:
            return []
        chunks = []
        pending = state.text[state.offset :]
        if pending or state.finish_reason:
            tokens = state.tokens[state.n_shown :]
            shown = _Choice(pending, tokens, state.logprobs, state.finish_reason, offset=state.offset)
            chunks.append(self._envelope([self._choice_json(choice, shown)]))
            state.offset, state.n_shown = len(state.text), len(state.tokens)
            state.logprobs = []
        if self.done:
            chunks += self._last_chunks(chunks)
        return chunks

    def _last_chunks(self, chunks: list[Chunk]) -> list[Chunk]:
        if chunks:
            chunks[-1]["timings"] = self.timings_json()
        return [{**self._envelope([]), "usage": self.usage()}] if self._usage_wanted else []

    @property
    def n_generated(self) -> int:
        """Tokens that were generated."""
        return 0 if self._nothing else super().n_generated

    def answer(self) -> Any:
        """Return the whole answer."""
        choices = [self._choice_json(i, choice) for i, choice in enumerate(self.choices)]
        return {**self._envelope(choices), "usage": self.usage(), "timings": self.timings_json()}

    def _envelope(self, choices: list[Chunk]) -> Chunk:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice_json(self, index: int, choice: _Choice) -> Chunk:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._logprobs_json(choice) if self._n_logprobs is not None else None,
            "finish_reason": choice.finish_reason,
        }

    def _logprobs_json(self, choice: _Choice) -> Chunk:
        entries = [json_logprob(self.context.tokenizer, logprob) for logprob in choice.logprobs]
        offsets, at = [], choice.offset
        for entry in entries:
            offsets.append(at)
            at += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
            # Not OpenAI's: the form that its chat API has, in which no two tokens look alike.
            "content": entries,
        }


class NativeCall(CompletionCall):
    """llama.cpp's `/completion`: other names, the same texts."""

    tail = b""

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        self._wanted = fields.strings("response_fields")
        if self._n_logprobs is not None and fields.boolean("post_sampling_probs"):
            raise bad("post_sampling_probs is not supported: n_probs are those before sampling", "post_sampling_probs")

    def _envelope(self, choices: list[Chunk]) -> Chunk:
        return choices[0]

    def _choice_json(self, index: int, choice: _Choice) -> Chunk:
        whole, request = self.choices[index], self.requests[index // self.requests[0].params.n]
        body: Chunk = {
            "index": index,
            "content": choice.text,
            "tokens": choice.tokens if self.fields.boolean("return_tokens") else [],
            "stop": choice.finish_reason is not None,
            "id_slot": self.slot,
            "tokens_predicted": len(whole.tokens),
            "tokens_evaluated": len(request.prompt),
        }
        if self._n_logprobs is not None:
            body["completion_probabilities"] = [
                json_logprob(self.context.tokenizer, logprob) for logprob in choice.logprobs
            ]
        if choice.finish_reason is not None:
            reason = whole.stop_reason
            word = isinstance(reason, str) and choice.finish_reason == "stop"
            body |= {
                "model": self.model,
                "generation_settings": self._settings(request.params),
                "prompt": self.context.tokenizer.decode(request.prompt, special=True),
                "has_new_line": "\n" in whole.text,
                "truncated": False,
                "stop_type": "limit" if choice.finish_reason == "length" else "word" if word else "eos",
                "stopping_word": reason if word else "",
                "tokens_cached": self.n_cached,
                "timings": self.timings_json(),
            }
            if self._wanted:
                return _picked(body, self._wanted)
        return body

    def _settings(self, params: RequestParams) -> Chunk:
        limit = limit_json(0) if self._nothing else {}
        return {**params_json(params), **limit, "stream": self.stream}

    def _last_chunks(self, chunks: list[Chunk]) -> list[Chunk]:
        return []

    def answer(self) -> Any:
        """Return the answer to one prompt, or an array of the answers to several."""
        bodies = [self._choice_json(i, choice) for i, choice in enumerate(self.choices)]
        return bodies[0] if len(bodies) == 1 else bodies


def _picked(body: Chunk, paths: tuple[str, ...]) -> Chunk:
    """Return some fields by their paths, those within others as a/b; what is not there is left out."""
    found: Chunk = {}
    for path in paths:
        value: Any = body
        try:
            for name in path.split("/"):
                value = value[name]
        except (KeyError, TypeError):
            continue
        found[path] = value
    return found
