"""Calls of functions: how models write them, how they are found in a text, and how one is forced."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from mpillama.openai.constraints import GrammarConstraint
from mpillama.openai.context import Context
from mpillama.openai.errors import as_bad_request, bad
from mpillama.openai.fields import Fields
from mpillama.openai.reasoning import ReasoningSplitter, held_back

HERMES = ("<tool_call>", "</tool_call>")
MISTRAL = "[TOOL_CALLS]"
LLAMA = "<|python_tag|>"
_MARKERS = (HERMES[0], MISTRAL, LLAMA)
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,128}")


@dataclass(frozen=True)
class ToolCall:
    """A call: the function's name, and its arguments as JSON."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Tools:
    """The functions that a request offers.

    Attributes:
        definitions: as they came, for the chat template.
        parameters: JSON schemas by name.
        forced: names of which one must be called; empty: the model may choose.
    """

    definitions: tuple[dict[str, Any], ...] = ()
    parameters: dict[str, Any] | None = None
    forced: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.definitions)


def read_tools(fields: Fields) -> Tools:
    """Read ``tools`` and ``tool_choice``; no tools if ``tool_choice`` is "none"."""
    for old in ("functions", "function_call"):
        if fields.has(old):
            raise bad(f"{old} is not supported any more: use tools and tool_choice", old)
    parameters: dict[str, Any] = {}
    for tool in fields.objects("tools"):
        tool.choice("type", "function")
        function = tool.object("function")
        name = function.required_string("name")
        if not _NAME.fullmatch(name):
            raise bad(f"{function.name('name')} must be letters, digits, _, -, . and :, at most 128", "tools")
        parameters[name] = function.object("parameters").body or {"type": "object", "properties": {}}
    choice = fields.any("tool_choice")
    if isinstance(choice, dict):
        inner = fields.object("tool_choice")
        name = (inner.object("function") if inner.has("function") else inner).required_string("name")
        if name not in parameters:
            raise bad(f"tool_choice names {name!r}, which is not among the tools", "tool_choice")
        forced: tuple[str, ...] = (name,)
    else:
        choice = fields.choice("tool_choice", "auto", "none", "required")
        if choice == "required" and not parameters:
            raise bad("tool_choice is required, but there are no tools", "tool_choice")
        forced = tuple(parameters) if choice == "required" else ()
        if choice == "none":
            return Tools()
    return Tools(tuple(fields.array("tools")), parameters, forced)


def style_of(context: Context) -> str:
    """Return how the model writes calls, by its chat template: ``hermes``, ``mistral``, ``llama``, or ``json``."""
    source = context.template.source if context.template else ""
    if HERMES[0] in source and "<function=" not in source:
        return "hermes"
    if MISTRAL in source:
        return "mistral"
    return "llama" if '"parameters"' in source and '"name"' in source else "json"


def force_call(context: Context, tools: Tools) -> GrammarConstraint:
    """Return the constraint that a text is one call of one of the forced functions, in the model's own style."""
    style = style_of(context)
    key = "parameters" if style == "llama" else "arguments"
    parameters = tools.parameters or {}
    root = "#/items" if style == "mistral" else "#"
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": name},
                key: _moved(
                    object_schema(parameters[name]),
                    f"{root}/anyOf/{i}/properties/{key}" if len(tools.forced) > 1 else f"{root}/properties/{key}",
                ),
            },
            "required": ["name", key],
            "additionalProperties": False,
        }
        for i, name in enumerate(tools.forced)
    ]
    schema: dict[str, Any] = calls[0] if len(calls) == 1 else {"anyOf": calls}
    if style == "mistral":
        schema = {"type": "array", "items": schema, "minItems": 1, "maxItems": 1}
    with as_bad_request("tools"):
        if style == "json" or style == "llama":
            return context.grammars.json_schema(schema)
        body = "%json " + json.dumps(schema)
        if style == "hermes":
            begin, end = (_literal(context, tag) for tag in HERMES)
            return context.grammars.lark(f'start: {begin} "\\n" call "\\n" {end}\ncall: {body}\n')
        return context.grammars.lark(f"start: {_literal(context, MISTRAL)} call\ncall: {body}\n")


def object_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a function's schema, which is of an object even if it does not say so."""
    return schema if "type" in schema or "$ref" in schema or "anyOf" in schema else {"type": "object", **schema}


def _moved(schema: Any, place: str) -> Any:
    """Return a schema that has become a part of another one: what its references name is elsewhere now."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {key: _moved(value, place) for key, value in schema.items()}
    if isinstance(moved.get("$ref"), str) and moved["$ref"].startswith("#"):
        moved["$ref"] = place + moved["$ref"][1:]
    return moved


def _literal(context: Context, text: str) -> str:
    """Return how a grammar spells a text: as its token if it is a control token."""
    if context.is_control(text):
        return f"<[{context.tokenizer.encode(text, add_special=False)[0]}]>"
    return json.dumps(text)


class ToolCallSplitter:
    """Splits an answer into text and calls, however the model writes these; a call is given out when it is complete.

    Understood are Hermes' and Qwen's ``<tool_call>{…}</tool_call>``, Mistral's ``[TOOL_CALLS]`` with an array or with
    ``name[ARGS]{…}``, and bare JSON with ``name`` and ``arguments`` or ``parameters`` (Llama 3; any forced call). JSON
    that is no call of a known function remains text.
    """

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self._held, self._mode = "", "start"

    def push(self, text: str) -> tuple[str, list[ToolCall]]:
        """Return what is certainly text, and the calls that have been completed."""
        self._held += text
        shown, calls = "", []
        while True:
            if self._mode == "start":
                beginning = self._held.lstrip()
                if not beginning:
                    break
                self._mode = "rest" if beginning[0] in "{[" and not MISTRAL.startswith(beginning[:12]) else "text"
                if beginning[0] == "[" and len(beginning) < len(MISTRAL) and MISTRAL.startswith(beginning):
                    self._mode = "start"
                    break
            if self._mode == "rest":
                break
            if self._mode == "call":
                at = self._held.find(HERMES[1])
                if at < 0:
                    break
                body, self._held = self._held[:at], self._held[at + len(HERMES[1]) :]
                found = self._parse(body)
                calls += found
                if not found:
                    shown += HERMES[0] + body + HERMES[1]
                self._mode = "text"
                continue
            at, marker = min(
                ((self._held.find(marker), marker) for marker in _MARKERS if marker in self._held), default=(-1, "")
            )
            if at < 0:
                n = len(self._held) - max(held_back(self._held, marker) for marker in _MARKERS)
                shown, self._held = shown + self._held[:n], self._held[n:]
                break
            shown += self._held[:at]
            self._held = self._held[at + len(marker) :] if marker == HERMES[0] else self._held[at:]
            self._mode = "call" if marker == HERMES[0] else "rest"
        return shown, calls

    def flush(self) -> tuple[str, list[ToolCall]]:
        """Return what is still held back, at the end of the text."""
        held, mode, self._held = self._held, self._mode, ""
        if mode in ("rest", "call"):
            calls = self._parse(held)
            if calls:
                return "", calls
        return (HERMES[0] + held if mode == "call" else held), []

    def _parse(self, text: str) -> list[ToolCall]:
        """Return the calls that a text consists of; none if there is anything else in it."""
        calls: list[ToolCall] = []
        text = text.strip()
        decoder = json.JSONDecoder()
        while text:
            for marker in (MISTRAL, LLAMA):
                text = text.removeprefix(marker).lstrip()
            named = re.match(r"([\w.:-]+)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?(?=\{)", text)
            try:
                value, end = decoder.raw_decode(text, named.end() if named else 0)
            except (ValueError, RecursionError):
                return []
            text = text[end:].lstrip("; \t\r\n,")
            items = [{"name": named[1], "arguments": value}] if named else value if isinstance(value, list) else [value]
            for item in items:
                call = self._as_call(item)
                if call is None:
                    return []
                calls.append(call)
        return calls

    def _as_call(self, item: Any) -> ToolCall | None:
        if not isinstance(item, dict):
            return None
        item = item["function"] if isinstance(item.get("function"), dict) else item
        name = item.get("name")
        arguments = item.get("arguments", item.get("parameters", {}))
        if not isinstance(name, str) or name not in self._names:
            return None
        return ToolCall(name, arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False))


class TagSplitter:
    """Splits a text into thought, content and calls, of a model that marks thoughts by tags.

    Args:
        reasoning: None: thoughts stay in the content.
        calls: None: there are no functions.
    """

    def __init__(self, reasoning: ReasoningSplitter | None, calls: ToolCallSplitter | None) -> None:
        self._reasoning, self._calls = reasoning, calls

    def split(self, text: str, end: bool) -> tuple[str, str, list[ToolCall]]:
        """Return what new text adds to thought, content and calls."""
        thought, content = "", text
        calls: list[ToolCall] = []
        if self._reasoning:
            thought, content = self._reasoning.push(text)
            if end:
                rest = self._reasoning.flush()
                thought, content = thought + rest[0], content + rest[1]
        if self._calls:
            content, calls = self._calls.push(content)
            if end:
                rest_content, rest_calls = self._calls.flush()
                content, calls = content + rest_content, calls + rest_calls
                # Between calls there are newlines that mean nothing.
                content = "" if calls and not content.strip() else content
        return thought, content, calls
