"""OpenAI's JSON to requests and back, with a model that writes at random."""

import json

import jsonschema
import numpy as np
import pytest

from mpillama.chat import template_from
from mpillama.data import demo_model_path
from mpillama.engine.engine import Engine
from mpillama.engine.request import Output, Request
from mpillama.errors import UserError
from mpillama.gguf.reader import read_header
from mpillama.openai.calls import open_call
from mpillama.openai.constraints import AfterThought, Grammars
from mpillama.openai.context import Context
from mpillama.openai.errors import ApiError
from mpillama.openai.reasoning import ReasoningSplitter
from mpillama.openai.tools import ToolCallSplitter
from mpillama.tokenizer import load_tokenizer
from shared import shared

HERMES = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or () %}<tool_call>"
    "{{ c.function | tojson }}</tool_call>{% endfor %}\n{% endfor %}{{ tools | tojson if tools }}"
    "{% if add_generation_prompt %}<assistant>{% if think %}<think>\n{% endif %}{% endif %}"
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TREE = {
    "type": "object",
    "properties": {"tree": {"$ref": "#/$defs/node"}},
    "required": ["tree"],
    "additionalProperties": False,
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "leaf": {"type": "boolean"},
                "next": {"anyOf": [{"$ref": "#/$defs/leaf"}, {"type": "null"}]},
            },
            "required": ["leaf", "next"],
            "additionalProperties": False,
        },
        "leaf": {"enum": ["oak", "elm"]},
    },
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def metadata():
    return read_header(demo_model_path()).metadata


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return load_tokenizer(metadata)


@pytest.fixture(scope="module")
def context(metadata, tokenizer):
    return make_context(metadata, tokenizer, "chatml")


def make_context(metadata, tokenizer, template):
    chosen = template_from(metadata, template) if template else None
    return Context("demo", tokenizer, chosen, tokenizer.n_vocab, 2048, 4)


def answer(context, rng, url, **body):
    """Return the call after an engine that writes at random has served it, and its chunks."""

    def run(batch):
        return rng.standard_normal((len(batch.logit_rows), context.n_vocab)).astype(np.float32)

    return served(context, url, body, run)


def served(context, url, body, run, n_batch=256):
    """Return the call after an engine over ``run`` has served it, and its chunks."""
    engine = Engine(run, context.tokenizer, context.n_vocab, context.n_ctx, n_batch, 64, 4)
    call = open_call(context, url, json.loads(json.dumps(body)))
    for request in call.requests:
        engine.add(request)
    chunks = []
    while engine.has_work():
        for output in engine.step():
            chunks += call.push(output)
    assert call.done
    return call, chunks


def feed(splitter, text, rng):
    """Return what a splitter makes of a text that comes in random pieces."""
    parts, at = [], 0
    while at < len(text):
        n = int(rng.integers(1, 8))
        parts.append(splitter.push(text[at : at + n]))
        at += n
    parts.append(splitter.flush())
    return parts


@pytest.mark.parametrize(
    ("text", "thinking", "expected"),
    [
        ("Hello <think>no</think>", False, ("", "Hello <think>no</think>")),
        ("<think>\na < b </thin\n</think>\n\nYes. ", False, ("a < b </thin", "Yes. ")),
        ("  \n<think>x</think>y", False, ("x", "y")),
        ("so</think>y", True, ("so", "y")),
        ("never ends \n", True, ("never ends", "")),
        ("<think></think>\n\ny", False, ("", "y")),
        ("  <thi", False, ("", "  <thi")),
        ("   ", False, ("", "   ")),
        ("", True, ("", "")),
    ],
)
def test_thoughts_are_split_off(text, thinking, expected, rng):
    for _ in range(10):
        parts = feed(ReasoningSplitter(("<think>", "</think>"), thinking), text, rng)
        assert ("".join(part[0] for part in parts), "".join(part[1] for part in parts)) == expected


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("no call { here", "no call { here", []),
        ('<tool_call>\n{"name": "f", "arguments": {"x": [1]}}\n</tool_call>', "", [("f", {"x": [1]})]),
        ('Ok <tool_call>{"name": "f"}</tool_call><tool_call>{"name": "g"}</tool_call>', "Ok ", [("f", {}), ("g", {})]),
        ('<tool_call>{"name": "unknown"}</tool_call> b', '<tool_call>{"name": "unknown"}</tool_call> b', []),
        ("<tool_call>{broken</tool_call>", "<tool_call>{broken</tool_call>", []),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [("f", {})]),
        ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
        ('{"name": "f", "parameters": {"a": "}"}}', "", [("f", {"a": "}"})]),
        ('{"name": "f", "parameters": {}}; {"name": "g", "parameters": {}}', "", [("f", {}), ("g", {})]),
        ('<|python_tag|>{"name": "g", "parameters": {}}', "", [("g", {})]),
        ('{"name": "other", "parameters": {}}', '{"name": "other", "parameters": {}}', []),
        ('[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g"}]', "", [("f", {"a": 1}), ("g", {})]),
        ('[TOOL_CALLS]f[ARGS]{"a": 1}', "", [("f", {"a": 1})]),
        ('[TOOL_CALLS]f[CALL_ID]a1[ARGS]{"a": 1}[TOOL_CALLS]g{}', "", [("f", {"a": 1}), ("g", {})]),
        ("[TOOL_CALLS]?", "[TOOL_CALLS]?", []),
        ("[1, 2]", "[1, 2]", []),
        ("<tool_cat>", "<tool_cat>", []),
        ("[TO", "[TO", []),
    ],
)
def test_calls_are_found_in_texts(text, content, calls, rng):
    for _ in range(10):
        parts = feed(ToolCallSplitter({"f", "g"}), text, rng)
        found = [(call.name, json.loads(call.arguments)) for part in parts for call in part[1]]
        assert ("".join(part[0] for part in parts), found) == (content, calls)


@pytest.mark.parametrize("template", ["chatml", HERMES, "[TOOL_CALLS]{{ tools }}" + HERMES.replace("<tool_call>", "")])
@pytest.mark.parametrize("stream", [False, True])
def test_forced_calls_in_every_style(metadata, tokenizer, template, stream, rng):
    context = make_context(metadata, tokenizer, template)
    call, chunks = answer(
        context, rng, "/v1/chat/completions", messages=USER, tools=[TOOL], tool_choice="required", stream=stream
    )
    if stream:
        calls = [each for chunk in chunks for each in chunk["choices"][0]["delta"].get("tool_calls", ())]
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = call.response()["choices"][0]
        calls, reason = choice["message"]["tool_calls"], choice["finish_reason"]
        assert choice["message"]["content"] is None
    assert reason == "tool_calls"
    assert [each["function"]["name"] for each in calls] == ["weather"]
    jsonschema.validate(json.loads(calls[0]["function"]["arguments"]), SCHEMA)


@pytest.mark.parametrize("template", ["chatml", "[TOOL_CALLS]{{ tools }}"])
@pytest.mark.parametrize("n_tools", [1, 2])
def test_forced_arguments_may_refer_to_definitions(metadata, tokenizer, template, n_tools, rng):
    tree = {"type": "function", "function": {"name": "plant", "parameters": TREE}}
    context = make_context(metadata, tokenizer, template)
    for _ in range(3):
        call, _ = answer(
            context,
            rng,
            "/v1/chat/completions",
            messages=USER,
            tools=[TOOL, tree][-n_tools:],
            tool_choice="required",
            ignore_eos=True,
        )
        (found,) = call.response()["choices"][0]["message"]["tool_calls"]
        schema = {"plant": TREE, "weather": SCHEMA}[found["function"]["name"]]
        jsonschema.validate(json.loads(found["function"]["arguments"]), schema)


def test_a_history_of_calls_reaches_the_template(metadata, tokenizer):
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    messages = [*USER, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages.append({"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "rain"}]})
    body = {"messages": messages, "tools": [TOOL]}
    made = open_call(make_context(metadata, tokenizer, HERMES), "/v1/chat/completions", body)
    assert '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>' in made.prompt
    assert "<tool>rain" in made.prompt
    plain = open_call(make_context(metadata, tokenizer, "chatml"), "/v1/chat/completions", body)
    assert "You can call these functions" in plain.prompt
    assert "rain<|im_end|>" in plain.prompt
    prefilled = open_call(
        make_context(metadata, tokenizer, "chatml"),
        "/v1/chat/completions",
        {"messages": [*USER, {"role": "assistant", "content": "Well,"}]},
    )
    assert prefilled.prompt.endswith("<|im_start|>assistant\nWell,")


def test_a_schema_holds_when_the_thought_is_over(metadata, tokenizer, rng):
    context = make_context(metadata, tokenizer, HERMES)
    body = {
        "messages": USER,
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}},
    }
    call, _ = answer(
        context, rng, "/v1/chat/completions", **body, chat_template_kwargs={"think": True}, reasoning_budget=5
    )
    message = call.response()["choices"][0]["message"]
    jsonschema.validate(json.loads(message["content"]), SCHEMA)
    constraint = call.requests[0].params.constraint
    assert isinstance(constraint, AfterThought)
    # A thought is free, but the text cannot end with it.
    allowed = np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[: tokenizer.n_vocab]
    assert sorted(np.flatnonzero(allowed == 0).tolist()) == sorted(tokenizer.eog_ids)


VOCABULARIES = ("llama-spm", "gpt-2")


@pytest.mark.parametrize("name", [None, *VOCABULARIES])
def test_random_texts_follow_their_grammar(name, rng, tokenizer):
    if name:
        tokenizer = load_tokenizer(read_header(shared("vocab", f"ggml-vocab-{name}.gguf")).metadata)
    grammars = Grammars(tokenizer, tokenizer.n_vocab + 3)
    constraint = grammars.json_schema(SCHEMA)
    assert grammars.json_schema(SCHEMA).mask().tolist() == constraint.mask().tolist()
    for _ in range(5):
        fork, ids = constraint.fork(), []
        while not fork.finished:
            bits = np.unpackbits(fork.mask().view(np.uint8), bitorder="little")
            assert not bits[tokenizer.n_vocab :].any()
            allowed = np.setdiff1d(np.flatnonzero(bits), list(tokenizer.eog_ids))
            ids.append(int(rng.choice(allowed)))
            fork.accept(ids[-1])
            assert len(ids) < 300
        text = b"".join(tokenizer.token_bytes(id_) for id_ in ids).decode()
        jsonschema.validate(json.loads(text), SCHEMA)


@pytest.mark.parametrize(
    ("kind", "text", "word"),
    [
        ("gbnf", "root ::= (", "grammar"),
        ("gbnf", "start ::= x", "grammar"),
        ("gbnf", 'root ::= "a" ' + "(" * 30000, "grammar"),
        ("lark", "start: missing", "missing"),
        ("regex", "[0-9]+(", "regular expression"),
        ("json_schema", {"type": "nonsense"}, "nonsense"),
        ("json_schema", {"$ref": "#/nowhere"}, "nowhere"),
        ("json_schema", 5, "object"),
        ("gbnf", "#" * 300_000, "characters"),
    ],
)
def test_what_no_grammar_is(tokenizer, kind, text, word):
    with pytest.raises(UserError, match=word) as caught:
        getattr(Grammars(tokenizer, tokenizer.n_vocab), kind)(text)
    assert "\n" not in str(caught.value)


def test_logprobs_belong_to_their_text(context, rng):
    call, chunks = answer(
        context, rng, "/v1/completions", prompt=["a", "b"], n=2, max_tokens=20, logprobs=3, stream=True, ignore_eos=True
    )
    assert call.n_generated == 80
    for index in range(4):
        mine = [c["choices"][0] for c in chunks if c["choices"] and c["choices"][0]["index"] == index]
        entries = [entry for choice in mine for entry in choice["logprobs"]["content"]]
        assert len(entries) == 20
        data = b"".join(bytes(entry["bytes"]) for entry in entries)
        assert data.decode(errors="replace") == "".join(choice["text"] for choice in mine)
        for entry in entries:
            assert len(entry["top_logprobs"]) == 3
            assert entry["top_logprobs"][0]["logprob"] >= entry["logprob"] - 1e-9


def test_a_call_that_fails_says_so(context):
    call = open_call(context, "/v1/completions", {"prompt": ["a", "b"]})
    first, second = (request.id for request in call.requests)
    assert call.push(Output(first, finish_reason="error", stop_reason="no way", last=True)) == []
    assert not call.done
    call.push(Output(second, finish_reason="cancelled", last=True))
    assert call.done
    with pytest.raises(ApiError, match="no way") as caught:
        call.response()
    assert caught.value.status == 500


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 2}, "top_p"),
        ({"mirostat": 3}, "mirostat"),
        ({"mirostat_tau": -1}, "mirostat_tau"),
        ({"typical_p": -1}, "typical_p"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 2, "best_of": 1}, "best_of"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 65}, "stop"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": [[1]]}, "logit_bias"),
        ({"logprobs": 101}, "logprobs"),
        ({"samplers": ["fancy"]}, "samplers"),
        ({"prompt": [[1, "a"]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"grammar": "x", "regex": "y"}, "grammar"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stream": "yes"}, "stream"),
        ({"suffix": "end"}, "suffix"),
        ({"reasoning_budget": -2}, "reasoning_budget"),
    ],
)
def test_the_wrong_field_is_named(context, body, param):
    with pytest.raises(ApiError) as caught:
        open_call(context, "/v1/completions", {"prompt": "a", **body})
    assert caught.value.status == 400
    assert caught.value.param == param, caught.value
    assert "--" not in caught.value.line


def test_fields_reach_the_engine(context):
    body = {
        "prompt": "a",
        "temperature": 0.5,
        "top_k": 7,
        "typical_p": 0.9,
        "mirostat_eta": 0.3,
        "seed": -5,
        "logit_bias": [[5, False], ["a", 2]],
        "samplers": "top_k;temperature",
        "stop": "x",
        "n_predict": 9,
        "cache_prompt": False,
        "user": "me",
        "service_tier": "flex",
        "top_p": None,
    }
    request: Request = open_call(context, "/completion", body).requests[0]
    sampling, params = request.params.sampling, request.params
    assert (sampling.temp, sampling.top_k, sampling.typical, sampling.mirostat_lr) == (0.5, 7, 0.9, 0.3)
    assert sampling.seed == 2**32 - 5
    assert sampling.logit_bias[0] == (5, -np.inf)
    assert sampling.logit_bias[1][1] == 2
    assert sampling.samplers == ("top_k", "temperature")
    assert sampling.top_p == context.sampling.top_p
    assert (params.stop, params.max_tokens, params.cache_prompt) == (("x",), 9, False)
