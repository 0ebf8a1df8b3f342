"""`/v1/messages`: Anthropic's API, in which messages and answers are blocks."""

from __future__ import annotations

import json
import re
from typing import Any

from mpillama.engine.request import Output
from mpillama.openai.call import Chunk
from mpillama.openai.context import Context
from mpillama.openai.errors import bad
from mpillama.openai.fields import Fields
from mpillama.openai.retold import RetoldChat

# Fields that mean the same in both APIs.
_SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "seed", "chat_template_kwargs")
_STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use"}
# A line for Anthropic's own servers that differs in each request: what follows it would never be found in the cache.
_BILLING = re.compile(r"x-anthropic-billing-header:[^\n]*\n*")


class MessagesCall(RetoldChat):
    """A chat in other words."""

    prefix = "msg_"

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        self._n_blocks, self._open_block = 0, ""
        self._stop_sequence: str | None = None

    def chat_body(self) -> Chunk:
        """Return the body of a chat completion that asks for the same."""
        return chat_body(self.fields, self.stream)

    def push(self, output: Output) -> list[Chunk]:
        """Take an output of the engine; returns the events that it is worth."""
        if output.finish_reason == "stop" and isinstance(output.stop_reason, str):
            self._stop_sequence = output.stop_reason
        return super().push(output)

    def frame(self, chunk: Chunk) -> bytes:
        """Return an event with its name, which it holds too."""
        return super().frame(chunk if "type" in chunk else {"type": "error", **chunk})

    # -- the stream ------------------------------------------------------------------------------------------------

    def begin(self) -> list[Chunk]:
        """Return the events before all others."""
        return [{"type": "message_start", "message": self._message([], ended=False)}]

    def end(self) -> list[Chunk]:
        """Return the events after all others."""
        stop = {"type": "message_delta", "delta": self._stop(), "usage": self.usage()}
        return [*self._end_block(), stop, {"type": "message_stop"}]

    def on_delta(self, delta: Chunk) -> list[Chunk]:
        """Return the events that a piece of the chat's message is worth."""
        events: list[Chunk] = []
        if delta.get("reasoning_content"):
            events += self._add("thinking", delta["reasoning_content"])
        if delta.get("content"):
            events += self._add("text", delta["content"])
        for call in delta.get("tool_calls", ()):
            events += self._end_block()
            events.append(self._begin_block("tool_use", {**_tool_use(call), "input": {}}))
            part = {"type": "input_json_delta", "partial_json": call["function"]["arguments"]}
            events += [self._delta(part), *self._end_block()]
        return events

    def _add(self, kind: str, text: str) -> list[Chunk]:
        events: list[Chunk] = []
        if self._open_block != kind:
            events += self._end_block()
            events.append(self._begin_block(kind, {"type": kind, kind: ""}))
        return [*events, self._delta({"type": f"{kind}_delta", kind: text})]

    def _begin_block(self, kind: str, block: Chunk) -> Chunk:
        self._open_block = kind
        return {"type": "content_block_start", "index": self._n_blocks, "content_block": block}

    def _delta(self, delta: Chunk) -> Chunk:
        return {"type": "content_block_delta", "index": self._n_blocks, "delta": delta}

    def _end_block(self) -> list[Chunk]:
        kind, self._open_block = self._open_block, ""
        if not kind:
            return []
        # Clients expect one, though there is nothing to prove of a thought here.
        events = [self._delta({"type": "signature_delta", "signature": ""})] if kind == "thinking" else []
        events.append({"type": "content_block_stop", "index": self._n_blocks})
        self._n_blocks += 1
        return events

    # -- the whole -------------------------------------------------------------------------------------------------

    def answer(self) -> dict[str, Any]:
        """Return the whole answer."""
        message = self.chat.message(0)
        blocks: list[Chunk] = []
        if message.get("reasoning_content"):
            blocks.append({"type": "thinking", "thinking": message["reasoning_content"], "signature": ""})
        if message["content"]:
            blocks.append({"type": "text", "text": message["content"]})
        blocks += [_tool_use(call) for call in message.get("tool_calls", ())]
        return self._message(blocks, ended=True)

    def usage(self) -> dict[str, Any]:
        """Return Anthropic's usage, in which what the cache had is no input."""
        n_cached = self.chat.n_cached
        return {
            "input_tokens": self.chat.n_prompt - n_cached,
            "cache_read_input_tokens": n_cached,
            "output_tokens": self.chat.n_generated,
        }

    def _stop(self) -> dict[str, str | None]:
        default = "stop_sequence" if self._stop_sequence is not None else "end_turn"
        reason = _STOP_REASONS.get(self.chat.choices[0].finish_reason or "", default)
        return {"stop_reason": reason, "stop_sequence": self._stop_sequence}

    def _message(self, blocks: list[Chunk], ended: bool) -> dict[str, Any]:
        stop = self._stop() if ended else {"stop_reason": None, "stop_sequence": None}
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": blocks,
            **stop,
            "usage": self.usage(),
        }


def _tool_use(call: Chunk) -> Chunk:
    function = call["function"]
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        arguments = {}
    return {"type": "tool_use", "id": call["id"], "name": function["name"], "input": arguments}


def chat_body(fields: Fields, stream: bool) -> Chunk:
    """Return the body of a chat completion that asks for the same."""
    messages = [message for item in fields.objects("messages") for message in _messages(item)]
    system = "\n".join(filter(None, (_BILLING.sub("", text) for text in _texts(fields, "system"))))
    if system:
        messages.insert(0, {"role": "system", "content": system})
    body: Chunk = {name: fields.any(name) for name in _SAME if fields.has(name)}
    body |= {"messages": messages, "stream": stream, "stop": list(fields.strings("stop_sequences"))}
    if fields.has("tools"):
        body["tools"] = [_tool(tool) for tool in fields.objects("tools")]
    if fields.has("tool_choice"):
        body["tool_choice"] = _tool_choice(fields.object("tool_choice"))
    thinking = fields.object("thinking")
    if thinking.has("budget_tokens"):
        body["thinking_budget_tokens"] = thinking.integer("budget_tokens", 0, low=0)
    if thinking.string("type") == "disabled":
        body["reasoning_effort"] = "none"
    return body


def _messages(item: Fields) -> list[Chunk]:
    """Return what a message says, after the results of tools that it has brought."""
    role = item.required_string("role")
    if role not in ("user", "assistant", "system"):
        raise item.wrong("role", "user or assistant")
    if isinstance(item.any("content"), str):
        return [{"role": role, "content": item.any("content")}]
    message: Chunk = {"role": role}
    texts, thoughts, calls, results = [], [], [], []
    for block in item.objects("content"):
        kind = block.required_string("type")
        if kind == "text":
            texts.append(block.string("text"))
        elif kind == "thinking":
            thoughts.append(block.string("thinking"))
        elif kind == "tool_use":
            function = {"name": block.required_string("name"), "arguments": block.object("input").body}
            calls.append({"id": block.string("id"), "type": "function", "function": function})
        elif kind == "tool_result":
            text = "\n".join(_texts(block, "content"))
            results.append({"role": "tool", "tool_call_id": block.string("tool_use_id"), "content": text})
        elif kind != "redacted_thinking":
            raise block.wrong("type", "text, thinking, tool_use or tool_result")
    if thoughts:
        message["reasoning_content"] = "".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    says_something = texts or thoughts or calls or not results
    return [*results, {**message, "content": "\n".join(texts)}] if says_something else results


def _texts(fields: Fields, name: str) -> list[str]:
    """Return the texts of a string or an array of blocks; none if it is absent."""
    if not fields.has(name):
        return []
    if isinstance(fields.any(name), str):
        return [fields.string(name)]
    texts = []
    for block in fields.objects(name):
        block.choice("type", "text")
        texts.append(block.string("text"))
    return texts


def _tool(tool: Fields) -> Chunk:
    kind = tool.string("type", "custom")
    if kind != "custom":
        raise bad(f"{tool.name('type')} is {kind!r}, but there are no tools of Anthropic's here", tool.name("type"))
    function = {"name": tool.required_string("name"), "parameters": tool.object("input_schema").body}
    if tool.has("description"):
        function["description"] = tool.string("description")
    return {"type": "function", "function": function}


def _tool_choice(choice: Fields) -> Any:
    kind = choice.choice("type", "auto", "any", "tool", "none")
    if kind == "tool":
        return {"type": "function", "function": {"name": choice.required_string("name")}}
    return "required" if kind == "any" else kind
