"""OpenAI's harmony format, which gpt-oss speaks: messages in a frame, and of each who is to see it.

``<|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{…}<|end|>``: the header says the
role, the recipient of a call (there, or behind the channel), the channel, and what the text is. The channel
``analysis`` has thoughts, ``final`` the answer, ``commentary`` calls and what the user may know of them. The last
message ends with a token that ends the generation.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Sequence
from typing import Any

from mpillama.openai.constraints import WHITE_SPACE, GrammarConstraint
from mpillama.openai.context import Context
from mpillama.openai.errors import as_bad_request
from mpillama.openai.reasoning import HARMONY_TAGS, held_back
from mpillama.openai.tools import ToolCall, Tools, object_schema

START, CHANNEL, CONSTRAIN, MESSAGE, END = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>"
ASSISTANT = START + "assistant"
ANALYSIS, FINAL = HARMONY_TAGS[0], f"{CHANNEL}final{MESSAGE}"
_FUNCTIONS = "functions."
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
# What the rest of a header begins with when the prompt has its role.
_BEGINNINGS = (CHANNEL, CONSTRAIN, MESSAGE, "to=")


# -- what goes in ------------------------------------------------------------------------------------------------------


def as_template_wants(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return messages as gpt-oss' template reads them.

    It knows one system message, a thought as ``thinking``, and one call in a message, whose result is next. Before a
    call it takes a thought or a text, not both, and no message of its own.
    """
    n_system = next((i for i, m in enumerate(messages) if m["role"] not in ("system", "developer")), len(messages))
    system = "\n\n".join(message["content"] for message in messages[:n_system])
    wanted: list[dict[str, Any]] = [{**messages[0], "content": system}] if n_system else []
    results: dict[str, deque[int]] = {}
    for i, message in enumerate(messages):
        if message["role"] == "tool":
            results.setdefault(message.get("tool_call_id", ""), deque()).append(i)
    placed: set[int] = set()
    before = ""
    for i, message in enumerate(messages[n_system:], n_system):
        if i in placed:
            continue
        thought = message.get("reasoning_content", "")
        said = "\n\n".join(filter(None, (before, thought, message["content"])))
        before = ""
        if "tool_calls" not in message:
            if message["role"] == "assistant" and any("tool_calls" in m for m in messages[i + 1 : i + 2]):
                before = said
            else:
                wanted.append({**message, "thinking": thought} if thought else message)
            continue
        for call in message["tool_calls"]:
            wanted.append({"role": "assistant", "content": "", "thinking": said, "tool_calls": [call]})
            said = ""
            # The next one: an id may be used again in a later turn.
            found = results.get(call["id"], deque())
            while found and found[0] < i:
                found.popleft()
            if found:
                placed.add(found[0])
                wanted.append(messages[found.popleft()])
    return wanted


def described(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return tools that all have a description, which gpt-oss' template relies on."""
    functions = [{**tool["function"], "description": tool["function"].get("description") or ""} for tool in tools]
    return [{**tool, "function": function} for tool, function in zip(tools, functions, strict=True)]


def continued(message: dict[str, Any]) -> str:
    """Return how the assistant's message begins that is to be continued."""
    thought = message.get("reasoning_content", "")
    return (f"{ANALYSIS}{thought}{END}{ASSISTANT}" if thought else "") + FINAL + message["content"]


def open_thought(prompt: str) -> str:
    """Return a prompt in which the model thinks already, if it ends where the assistant's turn begins."""
    return prompt + ANALYSIS if prompt.endswith(ASSISTANT) else prompt


# -- what is forced ----------------------------------------------------------------------------------------------------


def after_thought(tools: Tools, constrained: bool) -> str:
    """Return what follows the end of a thought, where the model does not choose that itself."""
    if tools.forced:
        return f"{ASSISTANT}{CHANNEL}commentary to={_FUNCTIONS}"
    # With nothing behind it, a model that has been told to stop thinking would begin to think again.
    return f"{ASSISTANT}{CHANNEL}commentary" if tools and not constrained else ASSISTANT + FINAL


def force_call(context: Context, tools: Tools) -> GrammarConstraint:
    """Return the constraint that a text, behind `after_thought`, is the rest of a call of a forced function."""
    rules = ["start: " + " | ".join(f"call{i}" for i in range(len(tools.forced)))]
    for i, name in enumerate(tools.forced):
        schema = object_schema((tools.parameters or {})[name]) | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}}
        header = (
            f"{json.dumps(name + ' ')} {_token(context, CONSTRAIN)} {json.dumps('json')} {_token(context, MESSAGE)}"
        )
        rules += [f"call{i}: {header} arguments{i}", f"arguments{i}: %json {json.dumps(schema)}"]
    with as_bad_request("tools"):
        return context.grammars.lark("\n".join(rules) + "\n")


def _token(context: Context, text: str) -> str:
    """Return how a grammar spells a part of the frame: as its token, which can also be written in letters."""
    ids = context.tokenizer.encode(text, add_special=False)
    return f"<[{ids[0]}]>" if len(ids) == 1 else json.dumps(text)


# -- what comes out ----------------------------------------------------------------------------------------------------


class HarmonySplitter:
    """Splits a text into thought, content and calls; a call is given out when it is complete.

    A call of an unknown function, or with arguments that are no JSON, remains text of its channel. So does the mark of
    an end after which no message begins: the model has spoken of it. A text without any frame is an answer.

    Args:
        prompt: what the text goes on with.
        names: of the functions that are known.
        keep: whether thoughts stay in the content, in their frame.
    """

    def __init__(self, prompt: str, names: set[str], keep: bool = False) -> None:
        self._names, self._keep = names, keep
        self._held = prompt.rpartition(START)[2] if START in prompt else ""
        # Of the header that the prompt has begun; of all others there is nothing.
        self._n_given: int | None = len(self._held)
        self._kind, self._name, self._gap = "", "", ""
        self._said: set[str] = set()
        self._thought, self._content = "", ""
        self._calls: list[ToolCall] = []
        self.split("", False)
        self._said.clear()

    def split(self, text: str, end: bool) -> tuple[str, str, list[ToolCall]]:
        """Return what new text adds to thought, content and calls."""
        self._thought, self._content, self._calls = "", "", []
        self._held += text
        while self._kind or self._read_header(end):
            n, after = _end_of_message(self._held, end)
            if self._kind != "call":
                self._say(self._held[:n], self._kind)
            elif after >= 0 or end:
                self._call(self._held[:n])
            else:
                break
            self._held = self._held[max(n, after) :]
            if after < 0:
                break
            if self._keep and self._kind == "thought":
                self._content += END
            self._kind, self._n_given = "", None
        return self._thought, self._content, self._calls

    def _read_header(self, end: bool) -> bool:
        """Whether the header is complete, so that its message begins."""
        if self._n_given is not None:
            written = self._held[self._n_given :].lstrip()
            if not any(written.startswith(b) or (not end and b.startswith(written)) for b in _BEGINNINGS):
                self._kind, self._held = "content", self._held[self._n_given :]
                return True
        header, found, rest = self._held.partition(MESSAGE)
        if not found:
            return False
        self._held = rest
        header = header.rpartition(START)[2]
        # The last ones count: small models write a channel and then another one.
        recipient = (_RECIPIENT.findall(header) or [""])[-1].removeprefix(_FUNCTIONS)
        channel = (_CHANNEL.findall(header) or [""])[-1]
        self._kind = "thought" if channel == "analysis" else "content"
        if recipient in self._names:
            self._kind, self._name = "call", recipient
        elif self._keep and self._kind == "thought":
            self._content += ANALYSIS
        self._gap = "\n\n" if self._kind in self._said else ""
        return True

    def _say(self, text: str, kind: str) -> None:
        if not text:
            return
        if kind == "thought" and not self._keep:
            self._thought += self._gap + text
        else:
            self._content += self._gap + text
        self._gap = ""
        if not self._keep:
            self._said.add(kind)

    def _call(self, text: str) -> None:
        arguments = text.strip() or "{}"
        try:
            json.loads(arguments)
        except (ValueError, RecursionError):
            self._gap = "\n\n" if "content" in self._said else ""
            self._say(text, "content")
        else:
            self._calls.append(ToolCall(self._name, arguments))


def _end_of_message(text: str, end: bool) -> tuple[int, int]:
    """Return how much of a text surely belongs to its first message, and where the next header begins; -1: nowhere."""
    at = text.find(END)
    while at >= 0:
        rest = text[at + len(END) :].lstrip()
        if rest.startswith(START):
            return at, len(text) - len(rest) + len(START)
        if START.startswith(rest):
            return at, -1
        at = text.find(END, at + 1)
    return len(text) - (0 if end else held_back(text, END)), -1
