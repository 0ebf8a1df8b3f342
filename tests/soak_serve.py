"""A long run of `mpillama serve` under clients of every kind; not a part of the tests: `make soak`.

Up to a thousand connections at a time do random things: good requests, wrong ones, and things that no one would wish
for. At the end nothing must be lost: every request has been answered, no rank has grown, all KV blocks are free, and
the server gives the same text as at the beginning and ends in peace.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import resource
import signal
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "jobs")]

from job import ranks_of, start  # noqa: E402

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "maximum": 99}}, "required": ["age"]}
CHAT = [{"role": "user", "content": "Tell me a story"}]
PATHS = ["/v1/completions", "/v1/chat/completions", "/completion", "/v1/embeddings", "/v1/responses"]
PATHS += ["/v1/messages", "/tokenize"]
# What a client may be told when nothing is wrong with its request: the queue or the house is full.
FULL = (429, 503)
ANSWER_SECONDS = 240.0


class WrongError(Exception):
    """Something that must not be."""


class Clients:
    """All clients of one server."""

    def __init__(self, port: int, seed: int) -> None:
        self.port, self.rng = port, random.Random(seed)
        self.done: Counter[str] = Counter()
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.large = asyncio.Semaphore(3)
        self.kinds: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (20, self.good),
            (8, self.small),
            (8, self.odd_fields),
            (6, self.broken),
            (3, self.slots),
            (4, self.leaves),
            (4, self.reads_slowly),
            (3, self.sends_slowly),
            (4, self.half_open),
            (3, self.garbage),
            (1, self.large_body),
        ]

    async def run(self, until: float) -> None:
        """Be one client after the other."""
        weights = [weight for weight, _ in self.kinds]
        while time.monotonic() < until and len(self.wrong) < 20:
            kind = self.rng.choices([kind for _, kind in self.kinds], weights)[0]
            try:
                await asyncio.wait_for(kind(), ANSWER_SECONDS)
                self.done[kind.__name__] += 1
            except asyncio.TimeoutError:
                self.wrong.append(f"{kind.__name__}: no answer within {ANSWER_SECONDS:g} s")
            except Exception:
                self.wrong.append(f"{kind.__name__}: {traceback.format_exc(limit=3)}")
            await asyncio.sleep(self.rng.random() * 0.2)

    # -- HTTP ------------------------------------------------------------------------------------------------------

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.port)

    def head(self, path: str, n: int, method: str = "POST") -> bytes:
        return f"{method} {path} HTTP/1.1\r\nHost: soak\r\nContent-Length: {n}\r\nConnection: close\r\n\r\n".encode()

    async def answer(self, reader: asyncio.StreamReader, allowed: tuple[int, ...]) -> tuple[int, bytes]:
        """Return a whole answer, whose status must be one of these."""
        data = await reader.read()
        while more := await reader.read():
            data += more
        found = re.match(rb"HTTP/1\.1 (\d+) ", data)
        if not found:
            raise WrongError(f"no answer: {data[:100]!r}")
        status = int(found[1])
        self.statuses[status] += 1
        if status not in allowed:
            raise WrongError(f"status {status}: {data[-300:]!r}")
        head, _, body = data.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower() and not body.endswith(b"0\r\n\r\n"):
            raise WrongError(f"an answer that does not end: {body[-100:]!r}")
        return status, body

    async def ask(self, path: str, body: Any, *allowed: int, method: str = "POST") -> tuple[int, bytes]:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        reader, writer = await self.connect()
        try:
            writer.write(self.head(path, len(data), method) + data)
            return await self.answer(reader, allowed)
        finally:
            writer.close()

    # -- clients ---------------------------------------------------------------------------------------------------

    def request(self) -> tuple[str, dict[str, Any]]:
        rng = self.rng
        text = "Once upon a time " * rng.randrange(1, 20) + str(rng.randrange(50))
        common = {"max_tokens": rng.randrange(1, 24), "stream": rng.random() < 0.5, "seed": rng.randrange(99)}
        return rng.choice(
            [
                ("/v1/completions", {"prompt": text, **common}),
                ("/v1/completions", {"prompt": [text, "One day"], "n": 2, "logprobs": 2, **common}),
                ("/completion", {"prompt": text, "n_probs": 3, "id_slot": rng.randrange(-1, 4), **common}),
                ("/v1/chat/completions", {"messages": CHAT, **common}),
                ("/v1/chat/completions", {"messages": CHAT, "reasoning_budget": 3, "ignore_eos": True, **common}),
                ("/v1/chat/completions", {"messages": CHAT, "response_format": {"type": "json_object"}, **common}),
                ("/v1/completions", {"prompt": text, "json_schema": SCHEMA, **common}),
                ("/v1/embeddings", {"input": [text, "a cat"]}),
                ("/v1/responses", {"input": text, "max_output_tokens": 5, "stream": common["stream"]}),
                ("/v1/messages", {"messages": CHAT, **common}),
            ]
        )

    async def good(self) -> None:
        path, body = self.request()
        status, answer = await self.ask(path, body, 200, *FULL)
        if status == 200 and b'"error":{' in answer:
            raise WrongError(f"{path}: {answer[-300:]!r}")

    async def small(self) -> None:
        path = self.rng.choice(["/health", "/metrics", "/slots", "/props", "/v1/models", "/openapi.json", "/"])
        await self.ask(path, b"", 200, *FULL, method="GET")
        await self.ask("/tokenize", {"content": "a " * self.rng.randrange(3000)}, 200, 503)

    async def odd_fields(self) -> None:
        path, body = self.request()
        odd: list[Any] = [None, -1, 1e308, 2**70, "", "\ud800", [], {}, [[]], True, "x" * 1000, [1, "a"], {"a": {}}]
        extra = [
            "stop",
            "temperature",
            "grammar",
            "regex",
            "logit_bias",
            "tools",
            "tool_choice",
            "n",
            "best_of",
            "user",
        ]
        for name in self.rng.sample([*body, *extra], self.rng.randrange(1, 4)):
            body[name] = self.rng.choice(odd)
        body["max_tokens"] = 2
        await self.ask(path, body, 200, 400, *FULL)

    async def broken(self) -> None:
        path, rng = self.rng.choice(PATHS), self.rng
        body = rng.choice(
            [
                b"{",
                b"[" * 100_000,
                b'{"prompt":' * 5000,
                b'{"prompt": "\xff\xfe"}',
                b'{"prompt": "\\ud800',
                b'{"prompt": ' + b"9" * 6000 + b"}",
                b'{"prompt": NaN}',
                b"\0" * 100,
                rng.randbytes(500),
                b'{"a":' + b"[" * 80 + b"]" * 80 + b"}",
            ]
        )
        await self.ask(path, body, 400, *FULL)

    async def slots(self) -> None:
        action = self.rng.choice(["save", "save", "restore", "erase", "burn"])
        name = self.rng.choice(["a", "b", "c", "../a", ".x", "no such file", "", "é"])
        await self.ask(f"/slots/{self.rng.randrange(-1, 10)}?action={action}", {"filename": name}, 200, 400, 503)

    async def leaves(self) -> None:
        path, body = self.request()
        data = json.dumps({**body, "max_tokens": 400}).encode()
        reader, writer = await self.connect()
        writer.write(self.head(path, len(data)) + data)
        if self.rng.random() < 0.7:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(reader.read(50), self.rng.random() * 3)
        if self.rng.random() < 0.5:
            # Not a farewell but a reset.
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.close()

    async def reads_slowly(self) -> None:
        body = {"prompt": "Once", "max_tokens": 60, "stream": True, "ignore_eos": True, "logprobs": 5}
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=256)
        try:
            writer.write(self.head("/v1/completions", len(data)) + data)
            for _ in range(self.rng.randrange(100)):
                if not await reader.read(64):
                    break
                await asyncio.sleep(0.02)
        finally:
            writer.close()

    async def sends_slowly(self) -> None:
        data = json.dumps({"prompt": "One day", "max_tokens": 2}).encode()
        reader, writer = await self.connect()
        try:
            message = self.head("/v1/completions", len(data)) + data
            for i in range(0, len(message), 10):
                writer.write(message[i : i + 10])
                await asyncio.sleep(0.1)
            await self.answer(reader, (200, *FULL))
        finally:
            writer.close()

    async def half_open(self) -> None:
        _, writer = await self.connect()
        start = [b"", b"GET", b"POST /completion HTTP/1.1\r\nContent-Length: 99\r\n\r\n{", b"GET / HTTP/1.1\r\nHost:"]
        writer.write(self.rng.choice(start))
        await asyncio.sleep(self.rng.random() * 20)
        writer.close()

    async def garbage(self) -> None:
        reader, writer = await self.connect()
        try:
            junk = [self.rng.randbytes(300), b"\x16\x03\x01\0\xff" * 9, b"GET / HTTP/9.9\r\n\r\n", b"A" * 100_000]
            writer.write(self.rng.choice(junk) + b"\r\n\r\n")
            writer.write_eof()
            # An answer or none: nothing was asked.
            await reader.read(100)
        except OSError:
            pass
        finally:
            writer.close()

    async def large_body(self) -> None:
        async with self.large:
            reader, writer = await self.connect()
            chunked = self.rng.random() < 0.5
            n, piece = 100 << 20, b"a" * (1 << 20)
            size = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % n
            status = b""
            try:
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: soak\r\n" + size + b"\r\n\r\n")
                reading = asyncio.ensure_future(reader.readline())
                for _ in range(n // len(piece)):
                    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
                    await writer.drain()
                    if reading.done():
                        break
                status = await reading
            except OSError:
                # The answer may be lost when the server closes with more of the body still to come.
                self.done["large bodies cut off"] += 1
            finally:
                writer.close()
            if status and not any(b" %d " % expected in status for expected in (413, *FULL)):
                raise WrongError(f"a body of 100 MB: {status!r}")


def memory_of(pids: list[int]) -> list[int]:
    """Return the resident bytes of processes."""
    page = resource.getpagesize()
    return [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * page for pid in pids]


async def soak(args: argparse.Namespace, port: int, pids: list[int]) -> tuple[Clients, list[tuple[float, list[int]]]]:
    """Run all clients, and note what the ranks hold meanwhile."""
    clients, samples = Clients(port, args.seed), []
    began = time.monotonic()
    asked = {"prompt": "Once upon a time", "max_tokens": 20, "temperature": 0}
    _, first = await clients.ask("/completion", asked, 200)
    tasks = [asyncio.ensure_future(clients.run(began + args.seconds)) for _ in range(args.connections)]
    everyone = asyncio.gather(*tasks)
    while not everyone.done():
        await asyncio.wait([everyone], timeout=2)
        samples.append((time.monotonic() - began, memory_of(pids)))
    await everyone
    for _ in range(120):
        _, metrics = await clients.ask("/metrics", b"", 200, method="GET")
        used = re.search(rb"^mpillama_kv_blocks_used (\d+)", metrics, re.M)
        if used and not int(used[1]):
            break
        await asyncio.sleep(0.5)
    else:
        clients.wrong.append(f"KV blocks are still in use: {used and used[1]}")
    _, slots = await clients.ask("/slots", b"", 200, method="GET")
    if b'"is_processing":true' in slots.replace(b" ", b""):
        clients.wrong.append(f"slots are still at work: {slots!r}")
    _, last = await clients.ask("/completion", asked, 200)
    if json.loads(first)["content"] != json.loads(last)["content"]:
        clients.wrong.append(f"another text than at the beginning: {first!r}, {last!r}")
    return clients, samples


def growth(samples: list[tuple[float, list[int]]], seconds: float) -> list[float]:
    """Return by how much each process has grown between the middle of the run and its end, as a share."""
    middle = [sizes for at, sizes in samples if 0.4 * seconds <= at < 0.6 * seconds]
    end = [sizes for at, sizes in samples if 0.8 * seconds <= at <= seconds]
    return [
        statistics.median(b) / statistics.median(a) - 1
        for a, b in zip(zip(*middle, strict=True), zip(*end, strict=True), strict=True)
    ]


def main() -> int:
    """Start a server, soak it, and say what was found; returns 0 if nothing."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--connections", type=int, default=1000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--growth", type=float, default=5.0, help="percent by which a rank may grow after the warm-up")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    args = parser.parse_args()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(f"seed {args.seed}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--port",
            0,
            "-np",
            8,
            "--max-body",
            8,
            "--timeout",
            60,
            "--max-queue",
            300,
            "-t",
            1,
            "--chat-template",
        ]
        job = start(["serve", *flags, "chatml", "--slot-save-path", folder], args.ranks)
        said: list[str] = []
        assert job.stderr is not None
        reader = threading.Thread(target=lambda: said.extend(iter(job.stderr.readline, "")), daemon=True)
        reader.start()
        while not (found := re.search(r"is ready at http://127\.0\.0\.1:(\d+)", "".join(said))):
            if job.poll() is not None:
                print("".join(said))
                return 1
            time.sleep(0.1)
        pids = ranks_of(job, args.ranks)
        clients, samples = asyncio.run(soak(args, int(found[1]), pids))
        wrong = clients.wrong
        job.send_signal(signal.SIGTERM)
        code = job.wait(60)
        reader.join(10)
        log = "".join(said)
    if code not in (0, 128 + signal.SIGTERM):
        wrong.append(f"exit code {code}")
    if "Traceback" in log or "stopped" not in log:
        wrong.append(f"stderr: {log[-3000:]}")
    grown = growth(samples, args.seconds)
    wrong += [f"rank {i} has grown by {share:.1%}" for i, share in enumerate(grown) if 100 * share > args.growth]
    for name, n in sorted(clients.done.items()):
        print(f"{name:22} {n}")
    print("statuses", dict(sorted(clients.statuses.items())))
    for at, sizes in samples[:: max(1, len(samples) // 12)]:
        print(f"{at:6.0f} s  {'  '.join(f'{size / 2**20:.1f} MiB' for size in sizes)}")
    print("grown by", ", ".join(f"{share:+.1%}" for share in grown))
    for line in wrong[:20]:
        print(f"WRONG: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
