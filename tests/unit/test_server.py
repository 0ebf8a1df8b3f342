"""The server's application without sockets: what it does when clients or the model are slow, or something breaks."""

import asyncio
import gc
import json
import signal
import socket
import threading
import time
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.chat import template_from
from mpillama.data import demo_model_path
from mpillama.engine.engine import Engine
from mpillama.engine.request import Request
from mpillama.gguf.reader import read_header
from mpillama.openai.context import Context
from mpillama.server import app as app_module
from mpillama.server import thread as thread_module
from mpillama.server.app import Api, Served
from mpillama.server.bridge import Bridge
from mpillama.server.encoder import Encoder
from mpillama.server.settings import Settings
from mpillama.server.slots import Slots
from mpillama.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def metadata():
    return read_header(demo_model_path()).metadata


def test_long_texts_are_encoded_elsewhere(metadata, rng):
    tokenizer = load_tokenizer(metadata)
    encoder = Encoder(tokenizer, metadata)
    proxy = encoder.proxy()
    words = ["Lily", " and", " the", "\n", "<|endoftext|>", " é", "\ud800", "🙂", " dragon"]
    text = "".join(rng.choice(words, 20_000))
    for asked in ((text, True, True), (text, False, False), (text[:50],)):
        assert proxy.encode(*asked) == tokenizer.encode(*asked)
    process = encoder._process
    process.send_signal(signal.SIGTERM)  # a launcher's, which is for the ranks
    assert proxy.encode(text) == tokenizer.encode(text)
    assert encoder._process is process
    process.kill()
    process.wait()
    assert proxy.encode(text) == tokenizer.encode(text)
    assert proxy.encode(text) == tokenizer.encode(text)
    replaced = encoder._process
    assert replaced is not process
    replaced.stdin.close()  # what happens when the server is killed
    assert replaced.wait(10) == 0


class Stand:
    """An application with an engine that writes at random on a thread behind it."""

    def __init__(self, step_seconds=0.0, loaded=True, template="chatml", budget=-1, **settings):
        metadata = read_header(demo_model_path()).metadata
        tokenizer = load_tokenizer(metadata)
        rng = np.random.default_rng(0)

        def run(batch):
            time.sleep(step_seconds)
            return rng.standard_normal((len(batch.logit_rows), tokenizer.n_vocab)).astype(np.float32)

        self.settings = Settings(grace=0, **settings)
        self.bridge = Bridge(self.settings.max_queue)
        self.api = Api(self.bridge, self.settings, lambda line: None)
        self.signals = SimpleNamespace(exit_code=0, time_is_short=False)
        self._engine = Engine(run, tokenizer, tokenizer.n_vocab, 512, 64, 64, 4)
        self._loaded = loaded
        if loaded:
            context = Context(
                "demo", tokenizer, template_from(metadata, template), tokenizer.n_vocab, 512, 4, reasoning_budget=budget
            )
            self.api.served = Served(context, {}, "")

    def play(self, scenario, grace=0):
        """Run a coroutine function of this stand, with the engine on a thread."""

        async def main():
            self.bridge.open()
            thread = threading.Thread(target=self.bridge.run, args=(self._engine, self.signals, grace, lambda n: None))
            if self._loaded:
                thread.start()
            try:
                return await asyncio.wait_for(scenario(self), 30)
            finally:
                self.signals.exit_code = 1
                if self._loaded:
                    await asyncio.get_running_loop().run_in_executor(None, thread.join)

        return asyncio.run(main())

    async def ask(self, path, body=None, send=None, receive=None, method="POST", headers=()):
        """Return what the application has sent."""
        data, sent, fed = json.dumps(body).encode(), [], False

        async def give():
            nonlocal fed
            if fed:
                await asyncio.Event().wait()
            fed = True
            return {"type": "http.request", "body": data, "more_body": False}

        async def take(message):
            sent.append(message)
            if send:
                await send(message)

        scope = {"type": "http", "method": method, "path": path, "headers": list(headers), "query_string": b""}
        await self.api.app({**scope, "root_path": "", "http_version": "1.1"}, receive or give, take)
        return sent

    async def until_free(self):
        while self.bridge.stats.kv_used or self.bridge.tickets or not self.bridge.stats.cancelled:
            await asyncio.sleep(0.01)


ENDLESS = {"prompt": "a", "ignore_eos": True, "max_tokens": 500, "stream": True}


def status_of(sent):
    return sent[0]["status"]


def body_of(sent):
    return b"".join(message.get("body", b"") for message in sent)


def test_a_reader_that_takes_nothing_is_dropped():
    async def scenario(stand):
        async def stuck(message):
            if message["type"] == "http.response.body":
                await asyncio.Event().wait()

        sent = await stand.ask("/v1/completions", ENDLESS, stuck)
        assert status_of(sent) == 200
        assert len(sent) == 2
        await stand.until_free()

    Stand(step_seconds=0.005, timeout=0.3).play(scenario)


def test_what_ends_with_the_server_is_still_told():
    async def scenario(stand):
        task = asyncio.create_task(stand.ask("/v1/completions", {**ENDLESS, "max_tokens": 9, "stream": False}))
        # On a busy machine it may have run and ended between two looks.
        while not stand.bridge.stats.running and not task.done():
            await asyncio.sleep(0.001)
        stand.signals.time_is_short = True
        sent = await task
        assert status_of(sent) == 200
        assert json.loads(body_of(sent))["usage"]["completion_tokens"] == 9
        while not stand.bridge.draining:
            await asyncio.sleep(0.001)

    for _ in range(5):
        Stand(step_seconds=0.01).play(scenario, grace=30)


def test_a_client_that_goes_while_something_comes_for_it(rng):
    """Streams end with it at once, also where its going meets an output."""

    async def scenario(stand):
        async def come_and_go():
            gone, n, fed = asyncio.Event(), int(rng.integers(1, 6)), False

            async def receive():
                nonlocal fed
                if fed:
                    await gone.wait()
                    return {"type": "http.disconnect"}
                fed = True
                return {"type": "http.request", "body": json.dumps(ENDLESS).encode(), "more_body": False}

            async def send(message):
                nonlocal n
                n -= message["type"] == "http.response.body"
                if not n:
                    gone.set()

            await stand.ask("/v1/completions", send=send, receive=receive)

        for _ in range(40):
            await asyncio.wait_for(asyncio.gather(*(come_and_go() for _ in range(6))), 5)
        await stand.until_free()

    Stand().play(scenario)


def test_a_sender_that_stops_is_told_so():
    async def scenario(stand):
        fed = False

        async def receive():
            nonlocal fed
            if fed:
                await asyncio.Event().wait()
            fed = True
            return {"type": "http.request", "body": b"{", "more_body": True}

        assert status_of(await stand.ask("/v1/completions", receive=receive)) == 408

    Stand(timeout=0.1).play(scenario)


def test_a_stream_shows_that_it_is_alive():
    async def scenario(stand):
        sent = await stand.ask("/v1/completions", {**ENDLESS, "max_tokens": 2})
        body = body_of(sent)
        assert body.count(b":\n\n") >= 2
        assert body.endswith(b"data: [DONE]\n\n")
        assert sent[-1]["more_body"] is False

    Stand(step_seconds=0.3, ping=0.05).play(scenario)


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/props"])
def test_while_the_model_is_loaded(path):
    async def scenario(stand):
        sent = await stand.ask(path, method="GET")
        assert status_of(sent) == 503
        assert (b"retry-after", b"2") in sent[0]["headers"]
        assert status_of(await stand.ask("/v1/completions", ENDLESS)) == 503
        assert status_of(await stand.ask("/", method="GET")) == 200

    Stand(loaded=False).play(scenario)


def test_a_mistake_of_ours_is_one_answer_and_a_log_entry(monkeypatch, capsys):
    async def scenario(stand):
        sent = await stand.ask("/v1/completions", {"prompt": "a"})
        assert status_of(sent) == 500
        assert b"secret" not in body_of(sent)

    def broken(context, url, body):
        raise RuntimeError("secret")

    monkeypatch.setattr(app_module, "open_call", broken)
    Stand().play(scenario)
    assert "RuntimeError: secret" in capsys.readouterr().err


def test_the_queue_has_an_end():
    async def scenario(stand):
        many = await stand.ask("/v1/completions", {**ENDLESS, "prompt": ["a"] * 7})
        assert status_of(many) == 400
        tasks = [asyncio.create_task(stand.ask("/v1/completions", {**ENDLESS, "stream": False})) for _ in range(9)]
        while len(running := [task for task in tasks if not task.done()]) > 6:
            await asyncio.sleep(0.01)
        assert [status_of(task.result()) for task in tasks if task.done()] == [429] * 3
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await stand.until_free()

    Stand(step_seconds=0.02, max_queue=2).play(scenario)


@pytest.mark.parametrize("given", [b"Bearer right", b"Bearer wrong", b"Bearer righ", b"Bearer \xe9", b"right", b""])
def test_keys(given):
    async def scenario(stand):
        headers = [(b"authorization", given)] if given else []
        sent = await stand.ask("/tokenize", {"content": "a"}, headers=headers)
        assert status_of(sent) == (200 if given == b"Bearer right" else 401)

    Stand(api_keys=("right", "other")).play(scenario)


def test_slots_know_who_has_written_what(rng):
    """Requests come and go at random; no two have a slot at a time, and each slot has the text of its last one."""
    slots, running, expected = Slots(3), {}, {}
    texts = [rng.integers(0, 9, 40).tolist() for _ in range(3)]
    for i in range(400):
        if rng.random() < 0.5:
            prompt = texts[rng.integers(3)] + rng.integers(0, 9, rng.integers(0, 60)).tolist()
            call = SimpleNamespace(id=f"{i}", slot=-1, wanted_slot=int(rng.integers(-1, 3)))
            before = [list(slot.text.tokens) for slot in slots]
            free = [slot.id for slot in slots if not slot.busy]
            slots.enter(Request(call.id, tuple(prompt)), call)
            running[call.id] = (call, prompt)
            assert (call.slot >= 0) == bool(free)
            alike = [
                n
                for n in free
                if before[n] and before[n][: (len(before[n]) + 1) // 2] == prompt[: (len(before[n]) + 1) // 2]
            ]
            if call.wanted_slot in free:
                assert call.slot == call.wanted_slot
            elif alike:
                assert call.slot in alike
        elif running:
            id_ = str(rng.choice(list(running)))
            call, tokens = running[id_]
            more = rng.integers(0, 9, 2).tolist()
            slots.add(id_, more)
            tokens += more
            if rng.random() < 0.7:
                del running[id_]
                if call.slot >= 0:
                    expected[call.slot] = tokens
                slots.leave(id_)
                slots.leave(id_)
        busy = [call.slot for call, _ in running.values() if call.slot >= 0]
        assert len(set(busy)) == len(busy) == min(3, len(running))
        for slot in slots:
            assert slot.busy == (slot.id in busy)
            if not slot.busy:
                assert slot.text.tokens == expected.get(slot.id, [])


@pytest.mark.parametrize(
    ("field", "flag", "budget"), [({"reasoning_budget": 7}, -1, 7), ({}, 4, 4), ({"reasoning_budget_tokens": 0}, 4, 0)]
)
@pytest.mark.parametrize("stream", [True, False])
def test_thoughts_end_within_their_budget(field, flag, budget, stream):
    asked = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 30, "ignore_eos": True, "logprobs": True}

    async def scenario(stand):
        # All but the control tokens, whose text does not show.
        bias = {"0": -100, "1": -100, "2": -100}
        body = body_of(
            await stand.ask("/v1/chat/completions", {**asked, **field, "stream": stream, "logit_bias": bias})
        )
        if not stream:
            choice = json.loads(body)["choices"][0]
            message = choice["message"]
            return message.get("reasoning_content", ""), message["content"], choice["logprobs"]["content"]
        chunks = [json.loads(line[6:])["choices"][0] for line in body.splitlines() if line.startswith(b"data: {")]
        deltas = [chunk["delta"] for chunk in chunks]
        kinds = [kind for delta in deltas for kind in ("reasoning_content", "content") if delta.get(kind)]
        assert kinds == sorted(kinds, reverse=True)
        tokens = [token for chunk in chunks for token in (chunk["logprobs"] or {"content": []})["content"]]
        return *(
            "".join(delta.get(kind) or "" for delta in deltas) for kind in ("reasoning_content", "content")
        ), tokens

    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>"
    thought, content, tokens = Stand(template=template, budget=flag).play(scenario)
    pieces = [bytes(token["bytes"]) for token in tokens]
    assert len(pieces) == 30
    text = b"".join(pieces).decode(errors="replace")
    n = len(b"".join(pieces[:budget]).decode(errors="replace"))
    assert text[n:].startswith("</think>")
    assert thought == text[:n].strip()
    assert content == text[n + len("</think>") :].lstrip()


@pytest.mark.parametrize("stream", [True, False])
def test_harmony_has_thoughts_and_a_schema(stream):
    asked = {
        "messages": [{"role": "user", "content": "Why?"}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["so", "no"]}}},
        "reasoning_budget": 6,
        "logit_bias": {"0": -100, "1": -100, "2": -100},
        "stream": stream,
    }

    async def scenario(stand):
        body = body_of(await stand.ask("/v1/chat/completions", asked))
        if not stream:
            choice = json.loads(body)["choices"][0]
            return choice["message"], choice["finish_reason"]
        chunks = [json.loads(line[6:])["choices"][0] for line in body.splitlines() if line.startswith(b"data: {")]
        kinds = ("reasoning_content", "content")
        deltas = [chunk["delta"] for chunk in chunks]
        message = {kind: "".join(delta.get(kind) or "" for delta in deltas) for kind in kinds}
        return message, chunks[-1]["finish_reason"]

    template = "{% for m in messages %}<|start|>user<|channel|>final<|message|>{{ m.content }}<|end|>{% endfor %}"
    message, reason = Stand(template=template + "<|start|>assistant").play(scenario)
    assert message["reasoning_content"]
    assert "<|" not in message["reasoning_content"]
    assert json.loads(message["content"]) in ("so", "no")
    assert reason == "stop"


def test_who_is_refused_is_heard_out_first():
    """Or the answer is lost, when the connection is closed with the rest of the body on its way."""

    async def scenario(stand):
        running = [asyncio.create_task(stand.ask("/v1/completions", {**ENDLESS, "stream": False})) for _ in range(6)]
        while len(stand.bridge.tickets) < 6:
            await asyncio.sleep(0.01)
        parts = [{"type": "http.request", "body": b"{", "more_body": True}] * 3
        parts.append({"type": "http.request", "body": b"}", "more_body": False})

        async def receive():
            await asyncio.sleep(0.01)
            return parts.pop(0)

        assert status_of(await stand.ask("/v1/completions", receive=receive)) == 429
        assert not parts
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await stand.until_free()

    Stand(step_seconds=0.02, max_queue=2).play(scenario)


def test_closed_connections_are_forgotten(monkeypatch):
    """Long before the timer would go off that closes one without a request."""
    known = weakref.WeakSet()
    made = thread_module._Connection.connection_made

    def connection_made(self, transport):
        known.add(self)
        made(self, transport)

    monkeypatch.setattr(thread_module._Connection, "connection_made", connection_made)
    stand = Stand(loaded=False)
    sock, _ = thread_module.listen("127.0.0.1", 0)
    http = thread_module.HttpThread(stand.api.app, sock, stand.bridge, stand.settings)
    http.start()
    for data in (b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", b"nonsense\r\n\r\n", b"GET"):
        with socket.create_connection(("127.0.0.1", sock.getsockname()[1]), timeout=10) as client:
            client.sendall(data)
            if data.endswith(b"\n"):
                while client.recv(65536):
                    pass
    began = time.monotonic()
    while gc.collect() >= 0 and len(known):
        assert time.monotonic() - began < 10
        time.sleep(0.05)
    http.stop()
