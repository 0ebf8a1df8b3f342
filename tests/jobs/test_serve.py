"""`mpillama serve` on two ranks: by OpenAI's own client, and by clients that no one would wish for."""

import base64
import json
import os
import re
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jsonschema
import numpy as np
import openai
import pytest

from mpillama import _cpu
from mpillama.data import demo_model_path
from mpillama.gguf.reader import read_header
from server import Server

CHAT = [{"role": "user", "content": "Tell me a story"}]
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "likes": {"type": "array", "items": {"enum": ["cats", "dogs"]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slots")
    with Server("--chat-template", "chatml", "-np", 8, "--max-body", 1, "--slot-save-path", folder) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def test_chat_and_its_stream_say_the_same(client):
    asked = {"model": "any", "messages": CHAT, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    choice = whole.choices[0]
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    assert b"".join(bytes(token.bytes) for token in choice.logprobs.content).decode() == choice.message.content
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in choice.logprobs.content)

    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == choice.message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == choice.finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    # The first request has left its prompt in the cache.
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens >= 16


def test_completions_of_many_prompts(client, server):
    prompts = ["Once upon a time", "One day", [485, 486]]
    many = client.completions.create(model="", prompt=prompts, max_tokens=12, temperature=0, stop="!")
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    for prompt, choice in zip(prompts, many.choices, strict=True):
        alone = client.completions.create(model="", prompt=prompt, max_tokens=12, temperature=0, stop="!")
        assert alone.choices[0].text == choice.text
        stream = client.completions.create(model="", prompt=prompt, max_tokens=12, temperature=0, stop="!", stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == choice.text
    several = client.completions.create(model="", prompt="One", max_tokens=5, n=3, best_of=4, seed=3, echo=True)
    assert len(several.choices) == 3
    assert all(choice.text.startswith("One") for choice in several.choices)
    status, native = server.ask("/completion", {"prompt": prompts[0], "n_predict": 12, "temperature": 0, "stop": ["!"]})
    assert (status, native["content"]) == (200, many.choices[0].text)
    assert native["timings"]["predicted_n"] == native["tokens_predicted"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_forced_tool_is_called(client, stream):
    answer = client.chat.completions.create(
        model="", messages=CHAT, tools=[WEATHER], tool_choice="required", max_tokens=100, stream=stream
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        calls = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        reason, content = chunks[-1].finish_reason, "".join(chunk.delta.content or "" for chunk in chunks)
    else:
        calls, reason = answer.choices[0].message.tool_calls, answer.choices[0].finish_reason
        content = answer.choices[0].message.content or ""
    assert [call.function.name for call in calls] == ["weather"]
    jsonschema.validate(json.loads(calls[0].function.arguments), WEATHER["function"]["parameters"])
    assert (reason, content) == ("tool_calls", "")


def test_structured_outputs_have_their_structure(client):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
    answer = client.chat.completions.create(model="", messages=CHAT, response_format=form, max_tokens=200, n=2)
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.message.content), PERSON)
    for field, value, pattern in (
        ("grammar", 'root ::= ("yes" | "no") ", " [0-9]{2}', r"(yes|no), [0-9]{2}"),
        ("regex", "[a-f]{3}-[0-9]{2}", "[a-f]{3}-[0-9]{2}"),
    ):
        text = client.completions.create(model="", prompt="Say", max_tokens=20, extra_body={field: value})
        assert re.fullmatch(pattern, text.choices[0].text)


def test_embeddings(client, server):
    texts = ["Lily has a cat", "The dog runs", "Lily has a cat"]
    floats = client.embeddings.create(model="", input=texts, encoding_format="float")
    packed = client.embeddings.create(model="", input=texts)  # the client asks for base64 by itself
    x, y = (np.array([item.embedding for item in each.data]) for each in (floats, packed))
    np.testing.assert_allclose(x, y, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(x[0], x[2], atol=1e-5)
    assert x[0] @ x[1] < 0.999
    raw = server.ask("/v1/embeddings", {"input": texts[1], "encoding_format": "base64"})[1]["data"][0]["embedding"]
    # Alone it has too few tokens for AMX, which rounds in another way.
    rounding = 2e-2 if "amx" in _cpu.levels() else 1e-5
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(raw), "<f4"), x[1], atol=rounding)


def test_responses(client):
    asked = {"model": "", "input": "Tell me a story", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**asked, instructions="Be brief")
    assert whole.status in ("completed", "incomplete")
    events = list(client.responses.create(**asked, instructions="Be brief", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text
    assert (
        events[-1].response.usage == whole.usage or events[-1].response.usage.output_tokens == whole.usage.output_tokens
    )


def test_what_is_wrong_is_said(client, server):
    with pytest.raises(openai.BadRequestError, match="context holds 512") as caught:
        client.completions.create(model="", prompt="a " * 2000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="grammar"):
        client.completions.create(model="", prompt="a", extra_body={"grammar": "root ::= ("})
    image = {"type": "image_url", "image_url": {"url": "data:"}}
    with pytest.raises(openai.BadRequestError, match="only text"):
        client.chat.completions.create(model="", messages=[{"role": "user", "content": [image]}])
    for path, body, status, word in (
        ("/v1/completions", b"{", 400, "JSON"),
        ("/v1/completions", b'{"prompt": "\xff"}', 400, "UTF-8"),
        ("/v1/completions", b"[" * 100_000, 400, "nested"),
        ("/v1/completions", b'{"prompt": ' + b"[" * 90 + b"]" * 90 + b"}", 400, "levels"),
        ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "JSON"),
        ("/v1/completions", b'{"prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "JSON"),
        ("/v1/completions", b'{"prompt": "' + b"a" * (1 << 20) + b'"}', 413, "larger"),
        ("/v1/completions", {"prompt": "a", "logprobs": -1}, 400, "logprobs"),
        ("/v1/embeddings", {"input": []}, 400, "input"),
        ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content"),
        ("/detokenize", {"tokens": [10**6]}, 400, "token"),
        ("/v1/nothing", {}, 404, "path"),
        ("/v1/completions", None, 405, "GET"),
    ):
        got, answer = server.ask(path, body)
        assert got == status, (path, body, answer)
        assert word in answer["error"]["message"], answer
    lone = server.ask("/v1/completions", b'{"prompt": "a\\ud800", "max_tokens": 1, "echo": true}')
    assert lone[0] == 200


def test_about_the_server(server):
    assert server.ask("/health") == (200, {"status": "ok"})
    assert server.ask("/v1/models")[1]["data"][0]["id"] == "mpillama demo"
    assert server.ask("/props")[1]["total_slots"] == 8
    assert len(server.ask("/slots")[1]) == 8
    ids = server.ask("/tokenize", {"content": "Once upon a time"})[1]["tokens"]
    assert server.ask("/detokenize", {"tokens": ids})[1] == {"content": "Once upon a time"}
    assert "<|im_start|>user\nTell me a story" in server.ask("/apply-template", {"messages": CHAT})[1]["prompt"]
    assert "<!doctype html>" in server.ask("/")[1]


def test_where_the_time_of_steps_goes(server, client):
    names = (
        "step_seconds",
        "run_seconds",
        "collective_seconds",
        "sample_seconds",
        "steps",
        "collectives",
        "collective_bytes",
    )
    before = [server.metric(f"mpillama_{name}_total") for name in names]
    client.completions.create(model="", prompt="One day", max_tokens=20, extra_body={"ignore_eos": True})
    after = [server.metric(f"mpillama_{name}_total") for name in names]
    spent = {name: b - a for name, a, b in zip(names, before, after, strict=True)}
    assert spent["step_seconds"] > spent["run_seconds"] > spent["collective_seconds"] > 0
    assert spent["step_seconds"] - spent["run_seconds"] > spent["sample_seconds"] > 0
    # In each step at least two sums for each block of the model, and the logits.
    n_blocks = read_header(demo_model_path()).metadata["llama.block_count"]
    assert spent["collectives"] >= spent["steps"] * (2 * n_blocks + 1)
    assert spent["collective_bytes"] > spent["collectives"]


def endless(stream=True):
    return {"prompt": "Once", "ignore_eos": True, "max_tokens": 480, "stream": stream}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(server, stream):
    before = server.metric("mpillama_requests_cancelled_total")
    sock = server.post_raw("/v1/completions", endless(stream))
    server.wait_for("llamacpp:requests_processing", [1])
    if stream:
        assert sock.recv(10)
    sock.close()
    server.wait_for("mpillama_kv_blocks_used", [0], limit=5)
    assert server.metric("mpillama_requests_cancelled_total") == before + 1


def test_rude_clients_harm_nobody(server, client):
    """Half-open and silent connections, slow readers, garbage, and 150 requests at a time."""
    sockets = [server.connect() for _ in range(40)]
    for i, sock in enumerate(sockets):
        sock.sendall(
            [
                b"",
                b"GET / HT",
                b"\x16\x03\x01\x00\xff" * 9,
                b"POST /completion HTTP/1.1\r\nContent-Length: 99\r\n\r\n{",
            ][i % 4]
        )
    slow = [server.post_raw("/v1/completions", {**endless(), "max_tokens": 40}) for _ in range(10)]

    def one(i):
        body = {"prompt": f"One day {i}", "max_tokens": 2, "stream": i % 2 == 0}
        return server.ask("/v1/completions", body)[0]

    with ThreadPoolExecutor(150) as pool:
        statuses = list(pool.map(one, range(150)))
    assert set(statuses) == {200}
    for sock in slow:
        data = b""
        while b"[DONE]" not in data:
            part = sock.recv(4096)
            assert part, data[-300:]
            data += part
    for sock in (*sockets, *slow):
        sock.close()
    server.wait_for("mpillama_kv_blocks_used", [0])
    assert client.completions.create(model="", prompt="One", max_tokens=2).choices


def test_no_input_makes_the_server_fail(server):
    """MPILLAMA_FUZZ_EXAMPLES=300 is the long form."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st
    from schemathesis.checks import not_a_server_error

    n = int(os.environ.get("MPILLAMA_FUZZ_EXAMPLES", "3"))
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    for result in schema.get_all_operations():
        operation = result.ok()

        @given(
            case=st.one_of(
                operation.as_strategy(), operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)
            )
        )
        @settings(max_examples=n, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
        def check(case):
            if isinstance(case.body, dict) and "max_tokens" in case.body:
                case.body["max_tokens"] = 2
            elif isinstance(case.body, dict):
                case.body |= {"max_tokens": 2, "max_output_tokens": 2}
            case.call_and_validate(checks=[not_a_server_error], timeout=60)

        check()
    counts = dict(re.findall(r'answers_total{status="(\d+)"} (\d+)', server.ask("/metrics")[1]))
    assert int(counts["200"]) > n
    assert int(counts["400"]) > n
    assert not [status for status in counts if status >= "500"]


def test_flags_for_requests_that_say_nothing():
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}|{{ enable_thinking }}|{{ reasoning_effort }}|{{ mood }}"
    )
    flags = ("-rea", "off", "--reasoning-effort", "low", "--chat-template-kwargs", '{"mood": "sad"}')
    with Server("-n", 3, "--chat-template", template, *flags, n_ranks=0) as server:
        shown = server.ask("/apply-template", {"messages": [{"role": "user", "content": "Hi"}]})[1]
        assert shown == {"prompt": "Hi|False|low|sad"}
        for more, n in (({}, 3), ({"max_tokens": 5}, 5)):
            answer = server.ask("/v1/completions", {"prompt": "One", "ignore_eos": True, **more})[1]
            assert answer["usage"]["completion_tokens"] == n


def test_keys_and_a_unix_socket(tmp_path):
    path, keys = tmp_path / "model.sock", tmp_path / "keys"
    keys.write_text("# mine\nfirst\n\nsecond\n")
    with Server("--host", path, "--api-key-file", keys, n_ranks=0, env={"LLAMA_API_KEY": "third"}):
        import httpx

        assert path.stat().st_mode & 0o077 == 0
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://model") as http:
            assert http.get("/health").status_code == 200
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer first "[:-2]}):
                assert http.post("/tokenize", json={"content": "a"}, headers=headers).status_code == 401
            for key in ("first", "second", "third"):
                answer = http.post("/tokenize", json={"content": "a"}, headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == 200
            assert http.post("/tokenize", json={"content": "a"}, headers={"X-Api-Key": "second"}).status_code == 200
            asked = http.options("/v1/completions", headers={"Origin": "http://page"})
            assert asked.headers["access-control-allow-origin"] == "http://page"


def test_a_signal_lets_running_requests_finish():
    with Server("-np", 1, "--grace", 30) as server:
        pool = ThreadPoolExecutor(1)
        running = pool.submit(server.ask, "/v1/completions", {**endless(stream=False), "max_tokens": 450})
        server.wait_for("llamacpp:requests_processing", [1])
        for pid in server.ranks:
            os.kill(pid, signal.SIGTERM)
        while server.ask("/health")[0] == 200:
            time.sleep(0.01)
        status, answer = server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1})
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        status, answer = running.result()
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 450
        assert server.wait() == 0


def test_time_that_runs_out_ends_what_runs():
    with Server("-np", 1, "--grace", 0, "--max-queue", 1) as server:
        sock = server.post_raw("/v1/completions", {**endless(), "max_tokens": 480})
        sock.recv(10)
        waiting = server.post_raw("/v1/completions", endless(stream=False))
        server.wait_for("llamacpp:requests_deferred", [1])
        status, answer = server.ask("/v1/completions", endless())
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        for pid in server.ranks:
            os.kill(pid, signal.SIGUSR1)
        data = b"".join(iter(lambda: sock.recv(65536), b""))
        assert b"shutting_down" in data[-500:]
        assert b" 503 " in waiting.recv(65536)
        assert server.wait() == 0


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job_and_its_streams(victim):
    with Server("-np", 2) as server:
        sock = server.post_raw("/v1/completions", endless())
        sock.recv(10)
        began = time.monotonic()
        os.kill(server.ranks[victim], signal.SIGKILL)
        data = b""
        try:
            while part := sock.recv(65536):
                data += part
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in data
        assert server.wait(5) != 0
        assert time.monotonic() - began < 5
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((server.host, server.port), timeout=1)


def test_ranks_do_not_outlive_their_launcher():
    with Server("-np", 2) as server:
        sock = server.post_raw("/v1/completions", endless())
        sock.recv(10)
        ranks = server.ranks
        # Its helpers too: some would end the ranks, and others have left them behind.
        helpers = {server.job.pid, *(int(Path(f"/proc/{pid}/stat").read_text().split()[3]) for pid in ranks)}
        for pid in helpers:
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        # A process may seem to have ended while one of its threads has not.
        while any(is_running(pid) for pid in ranks) or listens(server):
            assert time.monotonic() - began < 10
            time.sleep(0.05)


def listens(server):
    """Whether somebody takes connections where a server was."""
    try:
        socket.create_connection((server.host, server.port), timeout=1).close()
    except ConnectionError:
        return False
    return True


def is_running(pid):
    """Whether a process is there, and not merely waits for somebody to take note of its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
