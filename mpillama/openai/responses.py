"""`/v1/responses`: OpenAI's newer API, without anything stored."""

from __future__ import annotations

from typing import Any

from mpillama.openai.call import Chunk
from mpillama.openai.context import Context
from mpillama.openai.errors import bad
from mpillama.openai.fields import Fields
from mpillama.openai.retold import RetoldChat

# Fields that mean the same in both APIs.
_SAME = ("model", "temperature", "top_p", "seed", "parallel_tool_calls", "top_logprobs", "chat_template_kwargs")


class ResponsesCall(RetoldChat):
    """A chat in other words: items in, items out."""

    prefix = "resp_"

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        self._sequence = 0
        self._items: list[Chunk] = []
        self._item: Chunk | None = None

    def chat_body(self) -> Chunk:
        """Return the body of a chat completion that asks for the same."""
        for name in ("previous_response_id", "conversation", "prompt"):
            if self.fields.has(name):
                raise bad(f"{name} is not supported: nothing is stored, so send all messages as input", name)
        if self.fields.boolean("background"):
            raise bad("background is not supported: stay connected, or use mpillama batch", "background")
        return as_chat(self.fields, self.stream, self.context.harmony)

    # -- the stream ------------------------------------------------------------------------------------------------

    def _event(self, type: str, **fields: Any) -> Chunk:
        event = {"type": type, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    def begin(self) -> list[Chunk]:
        """Return the events before all others."""
        body = self._body("in_progress", [])
        return [self._event("response.created", response=body), self._event("response.in_progress", response=body)]

    def end(self) -> list[Chunk]:
        """Return the events after all others."""
        events = self._end_item()
        status = "incomplete" if self._cut_off else "completed"
        return [*events, self._event(f"response.{status}", response=self.answer())]

    def on_delta(self, delta: Chunk) -> list[Chunk]:
        """Return the events that a piece of the chat's message is worth."""
        events: list[Chunk] = []
        if delta.get("reasoning_content"):
            events += self._add_text("reasoning", delta["reasoning_content"])
        if delta.get("content"):
            events += self._add_text("message", delta["content"])
        for call in delta.get("tool_calls", ()):
            events += self._end_item()
            item = _call_item(call)
            at, arguments = len(self._items), item["arguments"]
            self._items.append(item)
            where = {"item_id": item["id"], "output_index": at}
            events += [
                self._event("response.output_item.added", output_index=at, item={**item, "arguments": ""}),
                self._event("response.function_call_arguments.delta", **where, delta=arguments),
                self._event("response.function_call_arguments.done", **where, arguments=arguments),
                self._event("response.output_item.done", output_index=at, item=item),
            ]
        return events

    def _add_text(self, kind: str, text: str) -> list[Chunk]:
        events: list[Chunk] = []
        if self._item is None or self._item["type"] != kind:
            events += self._end_item()
            self._item = _text_item(f"{kind[:3]}_{self.id}_{len(self._items)}", kind, "", "in_progress")
            at = len(self._items)
            added = {**self._item, "content": []}
            events.append(self._event("response.output_item.added", output_index=at, item=added))
            where = {"item_id": self._item["id"], "output_index": at, "content_index": 0}
            part = dict(self._item["content"][0])
            events.append(self._event("response.content_part.added", **where, part=part))
        self._item["content"][0]["text"] += text
        where = {"item_id": self._item["id"], "output_index": len(self._items), "content_index": 0}
        events.append(self._event(f"response.{_text_name(kind)}.delta", **where, delta=text, **_logprobs(kind)))
        return events

    def _end_item(self) -> list[Chunk]:
        item, self._item = self._item, None
        if item is None:
            return []
        at, kind, part = len(self._items), item["type"], item["content"][0]
        item["status"] = "completed"
        self._items.append(item)
        where = {"item_id": item["id"], "output_index": at, "content_index": 0}
        return [
            self._event(f"response.{_text_name(kind)}.done", **where, text=part["text"], **_logprobs(kind)),
            self._event("response.content_part.done", **where, part=part),
            self._event("response.output_item.done", output_index=at, item=item),
        ]

    # -- the whole -------------------------------------------------------------------------------------------------

    @property
    def _cut_off(self) -> bool:
        return self.chat.choices[0].finish_reason == "length"

    def answer(self) -> dict[str, Any]:
        """Return the whole answer."""
        if self.stream:
            return self._body("incomplete" if self._cut_off else "completed", self._items)
        message = self.chat.message(0)
        items: list[Chunk] = []
        if message.get("reasoning_content"):
            items.append(_text_item(f"rea_{self.id}_0", "reasoning", message["reasoning_content"], "completed"))
        if message["content"] or not message.get("tool_calls"):
            items.append(_text_item(f"mes_{self.id}_{len(items)}", "message", message["content"] or "", "completed"))
        items += [_call_item(call) for call in message.get("tool_calls", ())]
        return self._body("incomplete" if self._cut_off else "completed", items)

    def _body(self, status: str, items: list[Chunk]) -> dict[str, Any]:
        usage = self.chat.usage()
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": self.fields.any("instructions"),
            "model": self.model,
            "output": items,
            "parallel_tool_calls": True,
            "tool_choice": self.fields.any("tool_choice") or "auto",
            "tools": self.fields.array("tools"),
            "metadata": self.fields.object("metadata").body,
            "usage": None
            if status == "in_progress"
            else {
                "input_tokens": usage["prompt_tokens"],
                "input_tokens_details": usage["prompt_tokens_details"],
                "output_tokens": usage["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage["total_tokens"],
            },
        }


def _text_name(kind: str) -> str:
    return "output_text" if kind == "message" else "reasoning_text"


def _logprobs(kind: str) -> dict[str, Any]:
    return {"logprobs": []} if kind == "message" else {}


def _text_item(id_: str, kind: str, text: str, status: str) -> Chunk:
    if kind == "message":
        part: Chunk = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        return {"id": id_, "type": kind, "role": "assistant", "status": status, "content": [part]}
    part = {"type": "reasoning_text", "text": text}
    return {"id": id_, "type": kind, "status": status, "summary": [], "content": [part]}


def _call_item(call: Chunk) -> Chunk:
    function = call["function"]
    return {
        "id": f"fc_{call['id']}",
        "type": "function_call",
        "call_id": call["id"],
        "name": function["name"],
        "arguments": function["arguments"],
        "status": "completed",
    }


def as_chat(fields: Fields, stream: bool, thoughts: bool = False) -> Chunk:
    """Return the body of a chat completion that asks for the same, with earlier ``thoughts`` or without."""
    messages: list[Chunk] = []
    if fields.string("instructions"):
        messages.append({"role": "system", "content": fields.string("instructions")})
    if isinstance(fields.any("input"), str):
        messages.append({"role": "user", "content": fields.string("input")})
    else:
        thought = ""
        for item in fields.objects("input"):
            messages += _as_message(item)
            if item.string("type") == "reasoning":
                thought = _thought(item) if thoughts else ""
            elif thought:
                if messages[-1]["role"] == "assistant":
                    messages[-1]["reasoning_content"] = thought
                thought = ""
    if not fields.has("input"):
        raise bad("input is missing: give a string or an array of items", "input")
    body: Chunk = {name: fields.any(name) for name in _SAME if fields.has(name)}
    body |= {"messages": messages, "stream": stream}
    if fields.has("max_output_tokens"):
        body["max_tokens"] = fields.integer("max_output_tokens", 1, low=1)
    if fields.object("reasoning").has("effort"):
        body["reasoning_effort"] = fields.object("reasoning").string("effort")
    tools = fields.objects("tools")
    for tool in tools:
        tool.choice("type", "function")
    if tools:
        body["tools"] = [
            {"type": "function", "function": {k: v for k, v in t.body.items() if k != "type"}} for t in tools
        ]
    if fields.has("tool_choice"):
        body["tool_choice"] = fields.any("tool_choice")
    form = fields.object("text").object("format")
    if form.has("type"):
        body["response_format"] = dict(form.body)
    body.pop("top_logprobs", None)
    return body


def _as_message(item: Fields) -> list[Chunk]:
    kind = item.string("type", "message")
    if kind == "message":
        return [{"role": item.required_string("role"), "content": item.any("content")}]
    if kind == "function_call":
        function = {"name": item.required_string("name"), "arguments": item.string("arguments")}
        call = {"id": item.string("call_id"), "type": "function", "function": function}
        return [{"role": "assistant", "content": None, "tool_calls": [call]}]
    if kind == "function_call_output":
        return [{"role": "tool", "content": item.any("output"), "tool_call_id": item.string("call_id")}]
    if kind == "reasoning":
        return []
    raise item.wrong("type", "message, function_call, function_call_output or reasoning")


def _thought(item: Fields) -> str:
    return "\n\n".join(part.string("text") for part in item.objects("content") or item.objects("summary"))
