"""Anthropic's messages to chats and back, with a model that writes at random."""

import dataclasses
import json

import jsonschema
import numpy as np
import pytest
from test_openai import HERMES, SCHEMA, USER, answer, context, make_context, metadata, tokenizer  # noqa: F401 (fixtures)
from test_server import Stand, body_of, status_of

from mpillama.openai.anthropic import chat_body
from mpillama.openai.calls import open_call
from mpillama.openai.errors import ApiError
from mpillama.openai.fields import Fields

TOOL = {"name": "weather", "description": "Tells it", "input_schema": SCHEMA}
ASKED = {"messages": USER, "max_tokens": 200, "seed": 1}


def assemble(events):
    """Return the message that a stream of events is, as Anthropic's clients put it together."""
    message, blocks, ended = None, [], False
    for event in events:
        kind = event["type"]
        assert not ended
        if kind == "message_start":
            assert message is None
            message = event["message"]
        elif kind == "content_block_start":
            assert event["index"] == len(blocks)
            blocks.append({**event["content_block"], "json": "", "open": True})
        elif kind == "content_block_delta":
            assert blocks[event["index"]]["open"]
            part = event["delta"]
            name = {"input_json_delta": "json"}.get(part["type"], part["type"].removesuffix("_delta"))
            value = next(value for key, value in part.items() if key != "type")
            blocks[event["index"]][name] = blocks[event["index"]].get(name, "") + value
        elif kind == "content_block_stop":
            blocks[event["index"]]["open"] = False
        elif kind == "message_delta":
            message = {**message, **event["delta"], "usage": event["usage"]}
        else:
            assert kind == "message_stop"
            ended = True
    assert ended
    assert not any(block.pop("open") for block in blocks)
    for block in blocks:
        text = block.pop("json")
        if block["type"] == "tool_use":
            block["input"] = json.loads(text)
    return {**message, "content": blocks}


def both(context, **body):  # noqa: F811
    """Return the answer to a request, which has to be the same in a stream."""
    fixed = dataclasses.replace(context, new_id=lambda: "1")
    whole, _ = answer(fixed, np.random.default_rng(5), "/v1/messages", **ASKED, **body)
    _, events = answer(fixed, np.random.default_rng(5), "/v1/messages", **ASKED, **body, stream=True)
    assert assemble(events) == whole.response()
    return whole.response()


def test_a_text(context):  # noqa: F811
    told = both(context, thinking={"type": "disabled"})
    assert (told["id"], told["type"], told["role"], told["model"]) == ("msg_1", "message", "assistant", "demo")
    assert [block["type"] for block in told["content"]] == ["text"]
    expected = len(open_call(context, "/v1/chat/completions", {"messages": USER}).requests[0].prompt)
    assert told["usage"]["input_tokens"] == expected
    assert 0 < told["usage"]["output_tokens"] <= 201
    assert told["stop_reason"] == ("max_tokens" if told["usage"]["output_tokens"] >= 200 else "end_turn")


def test_a_stop_sequence(context):  # noqa: F811
    text = both(context)["content"][0]["text"]
    word = text[len(text) // 2 :][:3]
    told = both(context, stop_sequences=["never this", word])
    assert (told["stop_reason"], told["stop_sequence"]) == ("stop_sequence", word)
    assert told["content"][0]["text"] == text[: text.index(word)]


def test_a_thought_and_its_budget(metadata, tokenizer):  # noqa: F811
    made = make_context(metadata, tokenizer, HERMES)
    budget = {"type": "enabled", "budget_tokens": 6}
    told = both(made, thinking=budget, chat_template_kwargs={"think": True}, top_k=50)
    assert [block["type"] for block in told["content"]] == ["thinking", "text"]
    assert told["content"][0]["signature"] == ""
    short = open_call(made, "/v1/messages", {**ASKED, "thinking": budget}).requests[0].params
    assert short.reasoning_budget == 6


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_call(metadata, tokenizer, choice):  # noqa: F811
    told = both(make_context(metadata, tokenizer, HERMES), tools=[TOOL], tool_choice=choice)
    (block,) = told["content"]
    assert (block["type"], block["name"], told["stop_reason"]) == ("tool_use", "weather", "tool_use")
    assert block["id"]
    jsonschema.validate(block["input"], SCHEMA)


def test_a_history(metadata, tokenizer):  # noqa: F811
    text = {"type": "text", "text": "Look"}
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]}
    body = {
        "system": [
            {"type": "text", "text": "x-anthropic-billing-header: cch=12ab3;"},
            {"type": "text", "text": "Be kind"},
        ],
        "messages": [
            {"role": "user", "content": [text]},
            {"role": "assistant", "content": [{"type": "thinking", "thinking": "Hm", "signature": ""}, text, use]},
            {"role": "user", "content": [{"type": "text", "text": "And?"}, result]},
        ],
        "tools": [{**TOOL, "type": "custom"}],
        "tool_choice": {"type": "none"},
        "stop_sequences": ["x"],
    }
    chat = chat_body(Fields(body), stream=False)
    function = {"name": "weather", "arguments": {"city": "Oslo"}}
    assert chat["messages"] == [
        {"role": "system", "content": "Be kind"},
        {"role": "user", "content": "Look"},
        {
            "role": "assistant",
            "reasoning_content": "Hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
            "content": "Look",
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "user", "content": "And?"},
    ]
    assert (chat["tool_choice"], chat["stop"]) == ("none", ["x"])
    described = {"name": "weather", "description": "Tells it", "parameters": SCHEMA}
    assert chat["tools"] == [{"type": "function", "function": described}]
    call = open_call(
        make_context(metadata, tokenizer, HERMES), "/v1/messages", {**body, "tool_choice": {"type": "auto"}}
    )
    prompt = tokenizer.decode(call.requests[0].prompt, special=True)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>' in prompt
    assert "<tool>rain" in prompt


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": []}, "messages"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
def test_the_wrong_field_is_named(context, body, param):  # noqa: F811
    with pytest.raises(ApiError) as caught:
        open_call(context, "/v1/messages", {**ASKED, **body})
    assert (caught.value.status, caught.value.param) == (400, param), caught.value


def test_over_http():
    async def scenario(stand):
        sent = await stand.ask("/v1/messages", {**ASKED, "max_tokens": 9, "stream": True})
        body = body_of(sent).decode()
        assert status_of(sent) == 200
        events = [dict(line.split(": ", 1) for line in part.splitlines()) for part in body.split("\n\n") if part]
        assert all(json.loads(event["data"])["type"] == event["event"] for event in events)
        told = assemble([json.loads(event["data"]) for event in events])
        counted = json.loads(body_of(await stand.ask("/v1/messages/count_tokens", ASKED)))
        assert counted == {"input_tokens": told["usage"]["input_tokens"]}

    Stand().play(scenario)


def test_an_error_within_a_stream_is_an_event(context):  # noqa: F811
    call = open_call(context, "/v1/messages", {**ASKED, "stream": True})
    event, data = call.frame(ApiError(503, "gone").body()).decode().splitlines()[:2]
    assert event == "event: error"
    told = json.loads(data.removeprefix("data: "))
    assert told["type"] == "error"
    assert told["error"]["message"] == "gone"
