"""What clients of llama-server find here: its fields, its routes, and its flags for requests that say nothing."""

import dataclasses
import json

import numpy as np
import pytest
from test_openai import USER, answer, context, make_context, metadata, tokenizer  # noqa: F401 (fixtures)
from test_server import Stand, body_of, status_of

from mpillama.batch.job import Job
from mpillama.batch.requests import Line
from mpillama.batch.results import Results
from mpillama.cli.parser import parse
from mpillama.cli.serving_options import template_kwargs
from mpillama.engine.engine import Engine
from mpillama.errors import UsageError
from mpillama.openai.calls import open_call
from mpillama.openai.embeddings import EmbeddingCall
from mpillama.openai.errors import ApiError

THINKER = (
    "{% for m in messages %}{{ m.content }}{% endfor %}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ mood }}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXT = {"prompt": "One day", "ignore_eos": True, "n_predict": 20}


@pytest.mark.parametrize("n", [1, 2])
def test_each_chunk_has_its_own_tokens(context, rng, n):  # noqa: F811
    call, chunks = answer(context, rng, "/completion", **TEXT, return_tokens=True, stream=True, n_cmpl=n)
    for index in range(n):
        mine = [chunk for chunk in chunks if chunk["index"] == index]
        assert [token for chunk in mine for token in chunk["tokens"]] == call.choices[index].tokens
        assert [chunk["tokens_predicted"] for chunk in mine][-1] == 20
        assert "".join(chunk["content"] for chunk in mine) == call.choices[index].text
        assert len([chunk for chunk in mine if chunk["tokens"]]) > 5


def test_a_native_answer_says_how_it_came_about(context, rng):  # noqa: F811
    body = {**TEXT, "temperature": 0.5, "mirostat_tau": 4, "stop": ["zzz"], "logit_bias": [[5, False], [6, 1.5]]}
    call, _ = answer(context, rng, "/completion", **body)
    told = json.loads(json.dumps(call.response(), allow_nan=False))
    settings = told["generation_settings"]
    expected = {"temperature": 0.5, "mirostat_tau": 4, "typical_p": 1, "n_predict": 20, "max_tokens": 20}
    assert {name: settings[name] for name in expected} == expected
    assert settings["stop"] == ["zzz"]
    assert settings["logit_bias"][-2:] == [{"token": 5, "bias": False}, {"token": 6, "bias": 1.5}]
    assert told["prompt"].endswith("One day")
    assert told["has_new_line"] == ("\n" in told["content"])
    nothing, _ = answer(context, rng, "/completion", **{**TEXT, "n_predict": 0})
    assert nothing.response()["generation_settings"]["n_predict"] == 0


@pytest.mark.parametrize("stream", [False, True])
def test_fields_of_an_answer_are_picked(context, rng, stream):  # noqa: F811
    wanted = ["content", "generation_settings/n_predict", "timings/predicted_n", "no/such", "content/x"]
    call, chunks = answer(context, rng, "/completion", **TEXT, response_fields=wanted, stream=stream)
    told = chunks[-1] if stream else call.response()
    assert set(told) == set(wanted[:3])
    assert told["generation_settings/n_predict"] == told["timings/predicted_n"] == 20


@pytest.mark.parametrize("url", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_chunks_tell_their_times(context, rng, url):  # noqa: F811
    body = {"messages": USER} if "chat" in url else {"prompt": "One day"}
    body |= {"max_tokens": 20, "ignore_eos": True, "stream": True}
    _, plain = answer(context, rng, url, **body)
    assert sum("timings" in chunk for chunk in plain) == 1
    _, chunks = answer(context, rng, url, **body, timings_per_token=True)
    counts = [chunk["timings"]["predicted_n"] for chunk in chunks]
    assert counts == sorted(counts)
    assert len(set(counts)) > 5
    assert counts[-1] == 20
    times = [chunk["timings"]["predicted_ms"] for chunk in chunks[:-2]]
    assert times == sorted(times)
    assert all(chunk["timings"]["prompt_n"] > 0 for chunk in chunks)


@pytest.mark.parametrize(
    ("url", "body", "word"),
    [
        ("/completion", {"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ("/v1/chat/completions", {"lora": [{"id": 0, "scale": 1}]}, "lora"),
        ("/completion", {"n_probs": 2, "post_sampling_probs": True}, "post_sampling_probs"),
        ("/completion", {"n_cmpl": 5}, "n_cmpl"),
        ("/completion", {"response_fields": 5}, "response_fields"),
        ("/embedding", {"content": "a", "embd_normalize": -1}, "embd_normalize"),
        ("/v1/chat/completions", {"reasoning_format": "deepseek-legacy"}, "reasoning_format"),
    ],
)
def test_what_cannot_be_done_is_refused(context, url, body, word):  # noqa: F811
    with pytest.raises(ApiError, match=word) as caught:
        open_call(context, url, {"prompt": "a", "messages": USER, **body})
    assert (caught.value.status, caught.value.param) == (400, word)


@pytest.mark.parametrize(
    ("flag", "asked", "limit"), [(-1, {}, None), (7, {}, 7), (7, {"max_tokens": 9}, 9), (7, {"n_predict": -1}, 7)]
)
@pytest.mark.parametrize("url", ["/completion", "/v1/completions", "/v1/chat/completions"])
def test_the_servers_limit_of_tokens(context, url, flag, asked, limit):  # noqa: F811
    limited = dataclasses.replace(context, n_predict=flag)
    body = {"messages": USER} if "chat" in url else {"prompt": "a"}
    assert open_call(limited, url, {**body, **asked}).requests[0].params.max_tokens == limit


@pytest.mark.parametrize(
    ("flags", "asked", "shown"),
    [
        ([], {}, "||"),
        ([], {"reasoning_effort": "none"}, "False||"),
        ([], {"reasoning_effort": "high"}, "|high|"),
        (["-rea", "off"], {}, "False||"),
        (["-rea", "1"], {}, "True||"),
        (["--reasoning", "off"], {"chat_template_kwargs": {"enable_thinking": True}}, "True||"),
        (["--reasoning-effort", "low"], {}, "|low|"),
        (["--reasoning-effort", "low"], {"reasoning_effort": "high"}, "|high|"),
        (["--reasoning-effort", "low"], {"reasoning_effort": "none"}, "False||"),
        (["--reasoning-effort", "none"], {}, "False||"),
        (["--chat-template-kwargs", '{"mood": "sad", "enable_thinking": true}', "-rea", "off"], {}, "False||sad"),
        (["--chat-template-kwargs", '{"mood": "sad"}'], {"chat_template_kwargs": {"mood": "glad"}}, "||glad"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "batch", "chat"])
def test_flags_for_templates(metadata, tokenizer, flags, asked, shown, command):  # noqa: F811
    needed = ["-i", "a", "-o", "b"] if command == "batch" else []
    kwargs = template_kwargs(parse([command, *flags, *needed], {})[1])
    made = dataclasses.replace(make_context(metadata, tokenizer, THINKER), template_kwargs=kwargs)
    call = open_call(made, "/v1/chat/completions", {"messages": USER, **asked})
    assert call.prompt == f"Hi|{shown}<assistant>"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--chat-template-kwargs", "{"], "JSON object"),
        (["--chat-template-kwargs", "[]"], "JSON object"),
        (["--chat-template-kwargs", '{"messages": []}'], "messages"),
        (["-rea", "maybe"], "on, off or auto"),
        (["-n", "0"], "-n 0"),
        (["-n", "-2"], "-n"),
    ],
)
def test_flags_that_mean_nothing(flags, said):
    with pytest.raises(UsageError, match=said):
        parse(["serve", *flags], {})


def test_routes_without_a_version_are_llama_servers():
    async def scenario(stand):
        async def ask(path, body, method="POST"):
            sent = await stand.ask(path, body, method=method)
            assert status_of(sent) == 200, body_of(sent)
            return json.loads(body_of(sent))

        assert "content" in await ask("/completions", {"prompt": "a", "n_predict": 2})
        assert "choices" in await ask("/v1/completions", {"prompt": "a", "max_tokens": 2})
        for path in ("/embedding", "/embeddings"):
            told = await ask(path, {"content": ["a", "b"]})
            assert [item["index"] for item in told] == [0, 1]
            assert all(len(item["embedding"]) == 1 for item in told)
            assert sum(x * x for x in told[1]["embedding"][0]) == pytest.approx(1, abs=1e-4)
        params = (await ask("/props", None, "GET"))["default_generation_settings"]["params"]
        assert {"temperature", "typical_p", "mirostat_tau", "mirostat_eta", "n_predict", "top_k"} <= set(params)
        assert "temp" not in params

    Stand().play(scenario)


def test_tokens_are_counted_without_an_answer():
    async def scenario(stand):
        async def count(path, body):
            told = json.loads(body_of(await stand.ask(path, body)))
            assert told["object"] == "response.input_tokens"
            return told["input_tokens"]

        served = stand.api.served.context
        expected = len(open_call(served, "/v1/chat/completions", {"messages": USER}).requests[0].prompt)
        for prefix in ("/v1", ""):
            assert await count(f"{prefix}/chat/completions/input_tokens", {"messages": USER}) == expected
            assert await count(f"{prefix}/responses/input_tokens", {"input": "Hi"}) == expected
        # More than the context holds.
        assert await count("/v1/responses/input_tokens", {"input": "a b " * 2000}) > served.n_ctx
        assert status_of(await stand.ask("/v1/chat/completions/input_tokens", {"messages": []})) == 400
        assert not stand.bridge.stats.running

    Stand().play(scenario)


def test_a_batch_counts_the_tokens_of_every_kind_of_call(context, rng, tmp_path):  # noqa: F811
    def run(batch):
        return rng.standard_normal((len(batch.logit_rows), context.n_vocab)).astype(np.float32)

    asked = {
        "/completion": {"prompt": ["a", "b"], "n_predict": 4, "ignore_eos": True},
        "/embedding": {"content": ["a", "b"]},
        "/v1/embeddings": {"input": "a"},
        "/v1/completions": {"prompt": "a", "max_tokens": 4, "ignore_eos": True},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 4},
        "/v1/messages": {"messages": USER, "max_tokens": 4},
    }
    engine = Engine(run, context.tokenizer, context.n_vocab, context.n_ctx, 256, 64, 4)
    lines = [Line(i, url, url, body) for i, (url, body) in enumerate(asked.items())]
    calls = []

    def make_call(url, body):
        calls.append(open_call(context, url, body))
        return calls[-1]

    with Results(tmp_path / "out.jsonl") as results:
        summary = Job(engine, make_call, lines, results).run()
    assert (summary.answered, summary.failed) == (len(asked), 0)
    assert summary.n_prompt == sum(len(request.prompt) for call in calls for request in call.requests)
    assert all(call.n_generated > 0 for call in calls if not isinstance(call, EmbeddingCall))
    assert summary.n_generated == sum(call.n_generated for call in calls)
