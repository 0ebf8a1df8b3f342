"""OpenAI's harmony format: prompts that gpt-oss is given, and what is found in what it writes."""

import json
import re

import jsonschema
import numpy as np
import pytest
from test_openai import served

from mpillama.chat import template_from
from mpillama.data import demo_model_path
from mpillama.engine.reasoning import ReasoningLimit
from mpillama.gguf.reader import read_header
from mpillama.openai.calls import open_call
from mpillama.openai.constraints import AfterThought, Grammars
from mpillama.openai.context import Context
from mpillama.openai.errors import ApiError
from mpillama.openai.harmony import HarmonySplitter
from mpillama.tokenizer import load_tokenizer
from mpillama.tokenizer.vocabulary import TokenType

# The frame of what gpt-oss' own template writes, and what it refuses.
TEMPLATE = """\
{{- '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '<|end|>' }}
{%- set rest = messages[1:] if messages[0].role in ('system', 'developer') else messages %}
{%- if rest != messages or tools %}
    {{- '<|start|>developer<|message|>' + (messages[0].content if rest != messages else '') }}
    {%- for tool in tools or () %}{{ '// ' + tool.function.description + ' type ' + tool.function.name }}{% endfor %}
    {{- '<|end|>' }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for m in rest %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- set answered = namespace(yes=false) %}
        {%- for later in rest[loop.index:] %}
            {%- if later.role == 'assistant' and 'tool_calls' not in later %}{% set answered.yes = true %}{% endif %}
        {%- endfor %}
        {%- if m.content and m.thinking %}{{ raise_exception('both content and thinking') }}{% endif %}
        {%- if (m.content or m.thinking) and not answered.yes %}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) + '<|end|>' }}
        {%- endif %}
        {%- set last.name = m.tool_calls[0].function.name %}
        {{- '<|start|>assistant to=functions.' + last.name + '<|channel|>commentary json<|message|>' }}
        {{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
        {%- set last.name = none %}
    {%- elif m.role == 'tool' %}
        {%- if last.name is none %}{{ raise_exception('no call') }}{% endif %}
        {{- '<|start|>functions.' + last.name + ' to=assistant<|channel|>commentary<|message|>' }}
        {{- m.content | tojson + '<|end|>' }}
    {%- elif m.role == 'user' %}
        {{- '<|start|>user<|message|>' + m.content + '<|end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""
SYSTEM = "<|start|>system<|message|>Reasoning: medium<|end|>"
PROMPT = "<|start|>assistant"
THOUGHT, ANSWER = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
FRAME = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>")
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
TREE = {
    "type": "object",
    "properties": {"kind": {"$ref": "#/$defs/kind"}},
    "required": ["kind"],
    "additionalProperties": False,
    "$defs": {"kind": {"enum": ["oak", "elm"]}},
}
USER = {"role": "user", "content": "Hi"}
HI = "<|start|>user<|message|>Hi<|end|>"


@pytest.fixture(scope="module")
def metadata():
    """The demo model's vocabulary, with the frame in place of its last tokens."""
    metadata = dict(read_header(demo_model_path()).metadata)
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    tokens[-len(FRAME) :] = FRAME
    types[-len(FRAME) :] = [int(TokenType.CONTROL)] * len(FRAME)
    merges = [m for m in metadata["tokenizer.ggml.merges"] if m.replace(" ", "") in set(tokens)]
    return metadata | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


@pytest.fixture(scope="module")
def tokenizer(metadata):
    return load_tokenizer(metadata)


@pytest.fixture(scope="module")
def context(metadata, tokenizer):
    return Context("oss", tokenizer, template_from(metadata, TEMPLATE), tokenizer.n_vocab, 2048, 4)


def serve(context, url, body, script=None, rng=None):
    """Return a call, and its chunks, after a model has served it that writes a script, and then or else at random."""
    wanted = context.tokenizer.encode(script, add_special=False) if script else []

    def run(batch):
        logits = rng.standard_normal if rng else np.zeros
        logits = logits((len(batch.logit_rows), context.n_vocab)).astype(np.float32)
        if wanted and len(logits):
            logits[:, wanted.pop(0)] = 1e3
        return logits

    return served(context, url, body, run, n_batch=2048)


def said(context, script, rng=None, **body):
    """Return message and reason of an answer, which are the same as a stream."""
    body = {"messages": [USER], "temperature": 0, **body}
    call, _ = serve(context, "/v1/chat/completions", body, script, rng)
    (choice,) = call.response()["choices"]
    if rng is None:
        _, chunks = serve(context, "/v1/chat/completions", {**body, "stream": True}, script)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        for kind in ("content", "reasoning_content"):
            assert "".join(d.get(kind) or "" for d in deltas) == (choice["message"].get(kind) or "")
        calls = [(c["index"], c["function"]) for d in deltas for c in d.get("tool_calls", ())]
        assert calls == list(enumerate(c["function"] for c in choice["message"].get("tool_calls", ())))
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    return choice["message"], choice["finish_reason"]


# -- what goes in ------------------------------------------------------------------------------------------------------


def prompt_of(context, messages, **body):
    return open_call(context, "/v1/chat/completions", {"messages": messages, **body}).prompt


def called(id_, city, **more):
    function = {"name": "weather", "arguments": json.dumps({"city": city})}
    return {"role": "assistant", "tool_calls": [{"id": id_, "type": "function", "function": function}], **more}


def result(id_, text):
    return {"role": "tool", "tool_call_id": id_, "content": text}


def framed(city, text):
    begin = f'<|start|>assistant to=functions.weather<|channel|>commentary json<|message|>{{"city": "{city}"}}<|call|>'
    return begin + f'<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"{text}"<|end|>'


def test_old_thoughts_are_dropped_but_before_calls(context):
    answer = {"role": "assistant", "content": "Yes.", "reasoning_content": "Hm."}
    assert prompt_of(context, [USER, answer, USER]) == f"{SYSTEM}{HI}{PROMPT}{ANSWER}Yes.<|end|>{HI}{PROMPT}"
    asked = called("1", "Oslo", content=None, reasoning_content="Look.")
    prompt = prompt_of(context, [USER, asked, result("1", "rain")])
    assert prompt == f"{SYSTEM}{HI}{PROMPT}{THOUGHT}Look.<|end|>{framed('Oslo', 'rain')}{PROMPT}"
    # A text before a call goes with the thought: the template takes one of them.
    asked = called("1", "Oslo", content="A moment.", reasoning_content="Look.")
    assert f"{THOUGHT}Look.\n\nA moment.<|end|>" in prompt_of(context, [USER, asked, result("1", "rain")])


def test_each_result_is_behind_its_call(context):
    two = {**called("a", "Oslo"), "content": None, "reasoning_content": "Both."}
    two["tool_calls"] += called("b", "Rome")["tool_calls"]
    expected = f"{SYSTEM}{HI}{PROMPT}{THOUGHT}Both.<|end|>{framed('Oslo', 'rain')}{framed('Rome', 'sun')}{PROMPT}"
    assert prompt_of(context, [USER, two, result("b", "sun"), result("a", "rain")]) == expected
    # The same id again, and a message of its own before the call.
    again = [{"role": "assistant", "content": "Then"}, called("a", "Rome"), result("a", "snow")]
    prompt = prompt_of(context, [USER, called("a", "Oslo"), result("a", "rain"), *again])
    assert prompt == f"{SYSTEM}{HI}{framed('Oslo', 'rain')}{PROMPT}{THOUGHT}Then<|end|>{framed('Rome', 'snow')}{PROMPT}"


def test_instructions_and_tools(context):
    messages = [{"role": "system", "content": "A"}, {"role": "developer", "content": "B"}, USER]
    prompt = prompt_of(context, messages, tools=[TOOL], reasoning_effort="high")
    system = SYSTEM.replace("medium", "high")
    assert prompt == f"{system}<|start|>developer<|message|>A\n\nB//  type weather<|end|>{HI}{PROMPT}"


def test_an_answer_is_continued(context):
    begun = {"role": "assistant", "content": "Well", "reasoning_content": "Hm."}
    assert prompt_of(context, [USER, begun]).endswith(f"{PROMPT}{THOUGHT}Hm.{NEXT}{ANSWER}Well")
    message, _ = said(context, ", yes.<|return|>", messages=[USER, begun])
    assert message == {"role": "assistant", "content": ", yes."}
    with pytest.raises(ApiError, match="tool_choice forces a call"):
        prompt_of(context, [USER, begun], tools=[TOOL], tool_choice="required")


def test_responses_know_their_thoughts(context):
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "1", "name": "weather", "arguments": '{"city": "Oslo"}'},
        {"type": "function_call_output", "call_id": "1", "output": "rain"},
    ]
    call, _ = serve(context, "/v1/responses", {"input": items, "temperature": 0}, f"{ANSWER}Wet.<|return|>")
    prompt = context.tokenizer.decode(call.requests[0].prompt, special=True)
    assert prompt.endswith(f"{HI}{PROMPT}{THOUGHT}Look.<|end|>{framed('Oslo', 'rain')}{PROMPT}")
    assert [item["content"][0]["text"] for item in call.response()["output"]] == ["Wet."]


# -- what comes out ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "thought", "content", "calls"),
    [
        (f"{THOUGHT}Hm.{NEXT}{ANSWER}Yes.", "Hm.", "Yes.", []),
        (f"{THOUGHT}a{NEXT}{THOUGHT}b{NEXT}{ANSWER}c", "a\n\nb", "c", []),
        (f"{THOUGHT}a{NEXT}{CALL}{{}}", "a", "", ["{}"]),
        (f"{THOUGHT}{NEXT} to=functions.weather<|channel|>commentary json<|message|>[1]", "", "", ["[1]"]),
        (" to=functions.weather<|channel|>analysis<|message|>", "", "", ["{}"]),
        (f"<|channel|>commentary<|message|>Plan{NEXT}{CALL} 1 {NEXT}{CALL}2", "", "Plan", ["1", "2"]),
        (f"<|channel|>commentary to=functions.weather<|constrain|>json<|message|>3{NEXT}{ANSWER}x", "", "x", ["3"]),
        (f"<|channel|>commentary<|message|>Plan{NEXT}{ANSWER}Done", "", "Plan\n\nDone", []),
        # Python that nobody has offered is thought, a search that nobody has offered is text.
        ("<|channel|>analysis to=python code<|message|>1 + 1", "1 + 1", "", []),
        ('<|channel|>commentary to=functions.search <|constrain|>json<|message|>{"q": 1}', "", '{"q": 1}', []),
        (f'{CALL}{{"city": "Os', "", '{"city": "Os', []),
        # A stray channel, as gpt-oss-20b writes it.
        (f"<|channel|>commentary{THOUGHT}a{NEXT}{ANSWER}b", "a", "b", []),
        # The answer speaks of the frame.
        (f"{ANSWER}It says <|end|> and <|start|>.", "", "It says <|end|> and <|start|>.", []),
        # No frame at all, and what is cut off.
        ("Just text", "", "Just text", []),
        (" ", "", " ", []),
        ("", "", "", []),
        ("<|chan", "", "<|chan", []),
        ("<|channel|>ana", "", "", []),
        (f"{THOUGHT}a<|end|><|sta", "a", "", []),
        (f"{ANSWER}a<|en", "", "a<|en", []),
    ],
)
def test_a_text_is_split_wherever_it_is_cut(text, thought, content, calls):
    for at in range(len(text) + 1):
        splitter = HarmonySplitter(f"{HI}{PROMPT}", {"weather"})
        parts = [splitter.split(text[:at], False), splitter.split(text[at:], False), splitter.split("", True)]
        assert joined(parts) == (thought, content, calls)


def joined(parts):
    calls = [call.arguments for part in parts for call in part[2]]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts), calls


def read_at_once(text):
    """The same for a whole text that begins with a header."""
    found = {"thought": [], "content": [], "call": []}
    text = re.sub(r"<\|end\|>\s*(<(\|(s(t(a(r(t(\|)?)?)?)?)?)?)?)?$", "", text)
    for message in re.split(r"<\|end\|>\s*<\|start\|>", text):
        header, frame, body = message.partition("<|message|>")
        if not frame:
            continue
        header = header.rpartition("<|start|>")[2]
        channel = re.findall(r"<\|channel\|>\s*(\w+)", header)[-1:]
        kind = "thought" if channel == ["analysis"] else "content"
        if "weather" in re.findall(r"\bto=(?:functions\.)?([^\s<]+)", header)[-1:]:
            try:
                json.loads(body.strip() or "{}")
                kind, body = "call", body.strip() or "{}"
            except ValueError:
                kind = "content"
        found[kind] += [body] if body else []
    return "\n\n".join(found["thought"]), "\n\n".join(found["content"]), found["call"]


def test_random_texts_in_random_pieces(rng):
    pieces = [*FRAME[:5], NEXT, NEXT, THOUGHT, ANSWER, CALL, "{}", "[1, 2]", "a", " b\n", "<|", "to=", "é", "analysis"]
    for _ in range(500):
        text = str(rng.choice([THOUGHT, ANSWER, CALL])) + "".join(rng.choice(pieces, rng.integers(0, 25)))
        splitter, parts, at = HarmonySplitter(PROMPT, {"weather"}), [], 0
        while at < len(text):
            n = int(rng.integers(1, 12))
            parts.append(splitter.split(text[at : at + n], False))
            at += n
        parts.append(splitter.split("", True))
        assert joined(parts) == read_at_once(text), text


def test_kept_thoughts_have_their_frame():
    splitter = HarmonySplitter(PROMPT, {"weather"}, keep=True)
    parts = [splitter.split(f"{THOUGHT}a{NEXT}{CALL}{{}}{NEXT}{ANSWER}b", True)]
    assert joined(parts) == ("", f"{THOUGHT}a<|end|>b", ["{}"])


def test_answers_of_a_chat(context):
    message, reason = said(context, f"{THOUGHT}Hm.{NEXT}{ANSWER}Yes.<|return|>")
    assert (message["reasoning_content"], message["content"], reason) == ("Hm.", "Yes.", "stop")
    message, reason = said(context, f'{THOUGHT}Hm.{NEXT}{CALL}{{"city": "Oslo"}}<|call|>', tools=[TOOL])
    assert (message["reasoning_content"], message["content"], reason) == ("Hm.", None, "tool_calls")
    assert [c["function"] for c in message["tool_calls"]] == [{"name": "weather", "arguments": '{"city": "Oslo"}'}]
    message, reason = said(context, f"{THOUGHT}Hm.{NEXT}{ANSWER}Yes.<|return|>", reasoning_format="none")
    assert message == {"role": "assistant", "content": f"{THOUGHT}Hm.<|end|>Yes."}


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_responses(context, stream):
    tools = [{"type": "function", **TOOL["function"]}]
    script = f"{THOUGHT}Hm.{NEXT}<|channel|>commentary<|message|>Wait.{NEXT}{CALL}{{}}<|call|>"
    body = {"input": "Hi", "tools": tools, "temperature": 0, "stream": stream}
    call, _ = serve(context, "/v1/responses", body, script)
    items = call.response()["output"]
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call"]
    assert [item["content"][0]["text"] for item in items[:2]] == ["Hm.", "Wait."]
    assert (items[2]["name"], items[2]["arguments"]) == ("weather", "{}")


# -- what is forced ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [-1, 0, 5])
def test_a_schema_holds_in_the_answer(context, rng, budget):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    message, reason = said(context, f"Hm.{NEXT}", rng, response_format=form, reasoning_budget=budget)
    jsonschema.validate(json.loads(message["content"]), SCHEMA)
    assert reason == "stop"
    assert message.get("reasoning_content", "") == ("" if budget == 0 else "Hm.")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "plant"}}])
def test_a_call_is_forced(context, rng, choice):
    plant = {"type": "function", "function": {"name": "plant", "parameters": TREE}}
    message, reason = said(context, "Hm.<|end|>", rng, tools=[TOOL, plant], tool_choice=choice)
    (made,) = message["tool_calls"]
    assert (message["reasoning_content"], message["content"], reason) == ("Hm.", None, "tool_calls")
    name = made["function"]["name"]
    assert name == "plant" or choice == "required"
    jsonschema.validate(json.loads(made["function"]["arguments"]), {"weather": SCHEMA, "plant": TREE}[name])


def test_forced_arguments_have_little_white_space(context):
    body = {"messages": [USER], "tools": [TOOL], "tool_choice": "required"}
    constraint = open_call(context, "/v1/chat/completions", body).requests[0].params.constraint
    for token in context.tokenizer.encode(f"<|end|>{PROMPT}{CALL}{{ ", add_special=False):
        constraint.accept(token)
    (space,) = context.tokenizer.encode(" ", add_special=False)
    assert not np.unpackbits(constraint.mask().view(np.uint8), bitorder="little")[space]


def test_a_constraint_is_made_again_elsewhere(context, tokenizer):
    call = open_call(context, "/v1/chat/completions", {"messages": [USER], "regex": "[ab]"})
    constraint = call.requests[0].params.constraint
    assert isinstance(constraint, AfterThought)
    again = Grammars(tokenizer, tokenizer.n_vocab).again(constraint.source)
    assert again.source == constraint.source
    for token in tokenizer.encode(f"x{NEXT}{ANSWER}b", add_special=False):
        mask = np.unpackbits(again.mask().view(np.uint8), bitorder="little")
        assert mask[token]
        assert not again.finished
        again.accept(token)
    assert again.finished


@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_thoughts_end_within_their_budget(context, tools):
    script = f"{THOUGHT}one two three four five six{NEXT}{ANSWER}x<|return|>"
    body = {"messages": [USER], "tools": tools, "reasoning_budget": 3, "temperature": 0, "max_tokens": 40}
    call, _ = serve(context, "/v1/chat/completions", body, script)
    tokens = context.tokenizer.encode("one two three four five six", add_special=False)
    assert call.choices[0].thought == context.tokenizer.decode(tokens[:3])
    params = call.requests[0].params
    limit = ReasoningLimit(context.tokenizer, 0, params.reasoning_tags, (), params.reasoning_lead)
    for token in context.tokenizer.encode(THOUGHT, add_special=False):
        assert limit.forced() is None
        limit.accept(token)
    forced = []
    while limit.forced() is not None:
        forced.append(limit.forced())
        limit.accept(forced[-1])
    expected = f"{NEXT}<|channel|>commentary" if tools else f"{NEXT}{ANSWER}"
    assert context.tokenizer.decode(forced, special=True) == expected
