"""Messages of a chat to the prompt that the model's template makes of them."""

from __future__ import annotations

import json
from typing import Any

from mpillama.chat import RESERVED, encode_chat
from mpillama.openai import harmony
from mpillama.openai.context import Context
from mpillama.openai.errors import as_bad_request, bad
from mpillama.openai.fields import Fields
from mpillama.openai.tools import Tools, read_tools

_ROLES = ("user", "system", "assistant", "tool", "developer")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
    """Return the messages with their content as a string, and the arguments of tool calls as objects."""
    messages = [_message(item) for item in fields.objects("messages")]
    if not messages:
        raise bad("messages is missing or empty: give at least one message with role and content", "messages")
    return messages


def _message(item: Fields) -> dict[str, Any]:
    role = item.required_string("role")
    if role not in _ROLES:
        raise item.wrong("role", f"one of {', '.join(_ROLES)}")
    calls = [_tool_call(call) for call in item.objects("tool_calls")]
    message: dict[str, Any] = {"role": role, "content": _content(item, required=not (role == "assistant" and calls))}
    if calls:
        message["tool_calls"] = calls
    for name in ("name", "tool_call_id", "reasoning_content"):
        if item.has(name):
            message[name] = item.string(name)
    return message


def _content(item: Fields, required: bool) -> str:
    content = item.any("content")
    if content is None and (not required or item.has("reasoning_content")):
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise item.wrong("content", "a string or an array of parts")
    texts = []
    for part in item.objects("content"):
        kind = part.required_string("type")
        if kind in ("image_url", "input_image", "input_audio", "video_url", "file", "input_file"):
            raise bad(f"{part.name('type')} is {kind!r}, but only text is understood", part.name("type"))
        if kind == "refusal":
            texts.append(part.string("refusal"))
        elif kind in ("text", "input_text", "output_text"):
            texts.append(part.string("text"))
        else:
            raise part.wrong("type", "text")
    return "\n".join(texts)


def _tool_call(call: Fields) -> dict[str, Any]:
    function = call.object("function")
    arguments = function.any("arguments")
    # Templates write the arguments as JSON themselves, so they get the value, not its text.
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments) if arguments else {}
        except (ValueError, RecursionError):
            raise bad(f"{function.name('arguments')} is not valid JSON", function.name("arguments")) from None
    name = function.required_string("name")
    return {
        "id": call.string("id"),
        "type": "function",
        "function": {"name": name, "arguments": {} if arguments is None else arguments},
    }


def render_prompt(context: Context, fields: Fields, tools: Tools) -> str:
    """Return the prompt that the chat template makes of ``messages``.

    A last message of the assistant is continued, unless ``add_generation_prompt`` says that nothing is to be added.

    Raises:
        ApiError: there is no template, or it refuses the messages.
    """
    template = context.template
    if template is None:
        raise bad(
            "the model has no chat template: use /v1/completions, or start the server with --chat-template",
            code="no_chat_template",
        )
    messages = read_messages(fields)
    source = template.source
    if "developer" not in source:
        messages = [{**m, "role": "system"} if m["role"] == "developer" else m for m in messages]
    if "tools" not in source:
        messages = _without_tools(messages, tools)
    extra = _variables(context, fields)
    last = messages[-1]
    add = fields.boolean("add_generation_prompt", True)
    prefill = last["content"] if add and last["role"] == "assistant" and "tool_calls" not in last else None
    if prefill is not None:
        messages = messages[:-1]
    definitions = list(tools.definitions)
    if context.harmony:
        prefill = None if prefill is None else harmony.continued(last)
        messages, definitions = harmony.as_template_wants(messages), harmony.described(definitions)
    with as_bad_request("messages"):
        text = template.render(messages, add, definitions or None, **extra)
    return text + (prefill or "")


def _variables(context: Context, fields: Fields) -> dict[str, Any]:
    """Return the variables of the template that a request sets, or else the server's flags."""
    given = fields.object("chat_template_kwargs").body
    if RESERVED & set(given):
        raise bad(f"chat_template_kwargs cannot hold {sorted(RESERVED & set(given))[0]}", "chat_template_kwargs")
    extra = dict(context.template_kwargs)
    effort = fields.string("reasoning_effort")
    if effort == "none":
        # Templates know this word as a switch of its own.
        extra.pop("reasoning_effort", None)
        extra["enable_thinking"] = False
    elif effort:
        extra["reasoning_effort"] = effort
    return {**extra, **given}


def count_prompt(context: Context, fields: Fields) -> int:
    """Return how many tokens ``messages`` become, also if it is more than the context holds."""
    return len(encode_chat(context.tokenizer, render_prompt(context, fields, read_tools(fields))))


def encode_prompt(context: Context, text: str) -> tuple[int, ...]:
    """Return the ids of a rendered prompt; ApiError if it does not fit into the context."""
    if len(text) > 256 * context.n_ctx:
        return context.check_prompt(context.encode(text, "messages"), "messages")
    return context.check_prompt(encode_chat(context.tokenizer, text), "messages")


def _without_tools(messages: list[dict[str, Any]], tools: Tools) -> list[dict[str, Any]]:
    """Say in plain words what a template that knows no tools leaves out."""
    plain = []
    for message in messages:
        if message["role"] == "tool":
            plain.append({"role": "user", "content": f"Result of the function: {message['content']}"})
        elif "tool_calls" in message:
            calls = "\n".join(json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"])
            plain.append({"role": "assistant", "content": "\n".join(filter(None, (message["content"], calls)))})
        else:
            plain.append(message)
    if not tools:
        return plain
    offered = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools.definitions)
    words = (
        f"You can call these functions:\n{offered}\nTo call one, answer with nothing but JSON: "
        '{"name": "<function>", "arguments": {<arguments>}}'
    )
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{words}"}, *plain[1:]]
    return [{"role": "system", "content": words}, *plain]
