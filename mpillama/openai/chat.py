"""`/v1/chat/completions`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from mpillama.engine.request import Constraint, Logprob, Output
from mpillama.openai import harmony
from mpillama.openai.call import Call, Chunk, json_logprob
from mpillama.openai.constraints import AfterThought
from mpillama.openai.context import Context
from mpillama.openai.errors import bad
from mpillama.openai.fields import Fields
from mpillama.openai.harmony import HarmonySplitter
from mpillama.openai.messages import encode_prompt, render_prompt
from mpillama.openai.reasoning import ReasoningSplitter, opens_thought
from mpillama.openai.sampling import MAX_LOGPROBS, read_constraint, read_params
from mpillama.openai.tools import MISTRAL, TagSplitter, ToolCall, ToolCallSplitter, force_call, read_tools


@dataclass
class _Choice:
    splitter: TagSplitter | HarmonySplitter
    content: str = ""
    thought: str = ""
    tool_calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None
    begun: bool = False


class ChatCall(Call):
    """Answers messages."""

    prefix = "chatcmpl-"

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        if "audio" in fields.strings("modalities") or fields.has("audio"):
            raise bad("only text is spoken here: leave out modalities and audio", "modalities")
        self._usage_wanted = fields.object("stream_options").boolean("include_usage")
        wants = fields.boolean("logprobs") if isinstance(fields.any("logprobs"), bool) else fields.has("logprobs")
        self._n_logprobs = fields.integer("top_logprobs", 0, 0, MAX_LOGPROBS) if wants else None
        if fields.has("top_logprobs") and not wants:
            raise bad("top_logprobs needs logprobs to be true", "top_logprobs")
        self.tools = read_tools(fields)
        format_ = fields.choice("reasoning_format", "auto", "deepseek", "none")
        self.prompt = render_prompt(context, fields, self.tools)
        tags, lead = context.reasoning_tags, ""
        force = harmony.force_call if context.harmony else force_call
        grammar = force(context, self.tools) if self.tools.forced else read_constraint(context, fields)
        if context.harmony:
            lead = harmony.after_thought(self.tools, constrained=grammar is not None)
            if grammar is not None:
                # Where a thought ends is known; where an answer begins is known only if it must follow at once.
                self.prompt = harmony.open_thought(self.prompt)
        thinking = opens_thought(self.prompt, tags)
        constraint: Constraint | None = grammar
        if grammar is not None and thinking:
            constraint = AfterThought(grammar, context.tokenizer, tags[1], lead)
        elif context.harmony and self.tools.forced:
            raise bad("tool_choice forces a call, but the prompt ends within an answer", "tool_choice")
        params = read_params(
            context,
            fields,
            logprobs=self._n_logprobs,
            constraint=constraint,
            # Or what tells a thought, or a call, from the answer would not show.
            special=context.is_control(tags[1]) or (bool(self.tools) and context.is_control(MISTRAL)),
            budget=context.reasoning_budget,
        )
        params = replace(params, reasoning_lead=lead)
        self.add_requests([encode_prompt(context, self.prompt)], params)
        self.choices = [_Choice(self._splitter(format_ == "none", thinking)) for _ in range(params.n)]

    def _splitter(self, keep: bool, thinking: bool) -> TagSplitter | HarmonySplitter:
        names = set(self.tools.parameters or ())
        if self.context.harmony:
            return HarmonySplitter(self.prompt, names, keep)
        return TagSplitter(
            None if keep else ReasoningSplitter(self.context.reasoning_tags, thinking),
            ToolCallSplitter(names) if self.tools else None,
        )

    def take(self, choice: int, output: Output) -> list[Chunk]:
        """Add to a choice; a chunk waits until there is something to show."""
        state = self.choices[choice]
        thought, content, calls = state.splitter.split(output.text, output.finish_reason is not None)
        n_calls = len(state.tool_calls)
        state.thought += thought
        state.content += content
        state.tool_calls += calls
        state.logprobs += output.logprobs
        if output.finish_reason:
            called = state.tool_calls and output.finish_reason == "stop"
            state.finish_reason = "tool_calls" if called else output.finish_reason
        if not self.stream:
            return []
        chunks = []
        if not state.begun:
            state.begun = True
            chunks.append(self._chunk(choice, {"role": "assistant", "content": ""}))
        delta: Chunk = {}
        if thought:
            delta["reasoning_content"] = thought
        if content:
            delta["content"] = content
        if calls:
            delta["tool_calls"] = [
                {"index": i, **self._call_json(choice, i, call)} for i, call in enumerate(calls, n_calls)
            ]
        if delta:
            chunks.append(self._chunk(choice, delta, logprobs=self._take_logprobs(state)))
        if state.finish_reason:
            chunks.append(self._chunk(choice, {}, state.finish_reason, self._take_logprobs(state)))
        if self.done:
            chunks[-1]["timings"] = self.timings_json()
            if self._usage_wanted:
                chunks.append({**self._envelope("chat.completion.chunk", []), "usage": self.usage()})
        return chunks

    def answer(self) -> dict[str, Any]:
        """Return the whole answer."""
        choices = [
            {
                "index": i,
                "message": self.message(i),
                "logprobs": self._take_logprobs(state),
                "finish_reason": state.finish_reason,
            }
            for i, state in enumerate(self.choices)
        ]
        envelope = self._envelope("chat.completion", choices)
        return {**envelope, "usage": self.usage(), "timings": self.timings_json()}

    def message(self, choice: int) -> dict[str, Any]:
        """Return the message of one choice."""
        state = self.choices[choice]
        message: dict[str, Any] = {
            "role": "assistant",
            "content": state.content if state.content or not state.tool_calls else None,
        }
        if state.thought:
            message["reasoning_content"] = state.thought
        if state.tool_calls:
            message["tool_calls"] = [self._call_json(choice, i, call) for i, call in enumerate(state.tool_calls)]
        return message

    def _call_json(self, choice: int, number: int, call: ToolCall) -> dict[str, Any]:
        id_ = f"call_{self.id.removeprefix(self.prefix)}_{choice}_{number}"
        return {"id": id_, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def _take_logprobs(self, state: _Choice) -> dict[str, Any] | None:
        if self._n_logprobs is None:
            return None
        entries = [json_logprob(self.context.tokenizer, logprob) for logprob in state.logprobs]
        state.logprobs = []
        return {"content": entries, "refusal": None}

    def _chunk(
        self, choice: int, delta: Chunk, finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> Chunk:
        one = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._envelope("chat.completion.chunk", [one])

    def _envelope(self, object_: str, choices: list[Chunk]) -> Chunk:
        return {
            "id": self.id,
            "object": object_,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
