"""Put a load on a server of OpenAI's completions API, and say how fast it answers.

Works with any such server, so that two can be compared on the same load:

    python examples/load_test.py --url http://127.0.0.1:8080 --clients 16 --requests 64 --prompt 128 --tokens 128
    python examples/load_test.py --clients 64 --requests 64 --prompt 512 --shared 512 --tokens 32

Prompts are random token ids, so that their lengths are exact; with --shared, the first so many are the same in all of
them. Answers are streamed, and go on to their full length where the server understands ignore_eos.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass
class Result:
    """What became of one request; times are in seconds from its beginning."""

    error: str = ""
    first: float = 0.0
    whole: float = 0.0
    n_prompt: int = 0
    n_tokens: int = 0


async def lines_of(reader: asyncio.StreamReader, headers: dict[str, str]) -> AsyncIterator[bytes]:
    """Yield the lines of an answer's body as they come."""
    rest = b""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readline()).partition(b";")[0], 16):
            rest += (await reader.readexactly(size + 2))[:-2]
            *lines, rest = rest.split(b"\n")
            for line in lines:
                yield line
    else:
        n = int(headers.get("content-length", "-1"))
        rest = await reader.readexactly(n) if n >= 0 else await reader.read()
    for line in rest.split(b"\n"):
        yield line


async def ask(args: argparse.Namespace, prompt: list[int]) -> Result:
    """Send one request on a connection of its own."""
    url = urlsplit(args.url)
    secure = ssl.create_default_context() if url.scheme == "https" else None
    port = url.port or (443 if secure else 80)
    asked = {
        "model": args.model,
        "prompt": prompt,
        "max_tokens": args.tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if args.temperature is not None:
        asked["temperature"] = args.temperature
    body = json.dumps(asked).encode()
    head = f"POST {url.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {url.hostname}:{port}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
    if args.api_key:
        head += f"Authorization: Bearer {args.api_key}\r\n"
    result = Result()
    began = time.perf_counter()
    reader, writer = await asyncio.open_connection(url.hostname, port, ssl=secure)
    try:
        writer.write(head.encode() + b"\r\n" + body)
        status = (await reader.readline()).decode().split(maxsplit=1)[1].strip()
        headers = {}
        while line := (await reader.readline()).decode().strip():
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        if not status.startswith("200"):
            result.error = status
            return result
        n_chunks, usage = 0, None
        async for line in lines_of(reader, headers):
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                result.error = str(chunk["error"].get("message", chunk["error"]))
                return result
            if chunk.get("choices"):
                n_chunks += 1
                result.first = result.first or time.perf_counter() - began
            usage = chunk.get("usage") or usage
        result.whole = time.perf_counter() - began
        result.n_prompt = usage["prompt_tokens"] if usage else len(prompt)
        result.n_tokens = usage["completion_tokens"] if usage else n_chunks
        if not n_chunks:
            result.error = "an empty answer"
    finally:
        writer.close()
    return result


async def run(args: argparse.Namespace) -> tuple[list[Result], float]:
    """Let all clients send their requests; returns the results, and the seconds that it took."""
    rng = random.Random(args.seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(args.min_id, args.max_id) for _ in range(n)]

    shared = ids(min(args.shared, args.prompt))
    prompts = [shared + ids(args.prompt - len(shared)) for _ in range(args.requests)]
    # Those that share all of it would be the same request.
    if args.shared >= args.prompt:
        prompts = [[*prompt, *ids(8)] for prompt in prompts]
    todo = iter(prompts)
    results: list[Result] = []

    async def client() -> None:
        for prompt in todo:
            try:
                result = await asyncio.wait_for(ask(args, prompt), args.timeout)
            except (OSError, ValueError, IndexError, asyncio.IncompleteReadError, asyncio.TimeoutError) as error:
                result = Result(error=f"{type(error).__name__}: {error}".rstrip(": "))
            results.append(result)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(min(args.clients, args.requests))))
    return results, time.perf_counter() - began


def percentile(values: list[float], percent: float) -> float:
    """Return the smallest value that so many percent are not above; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def report(results: list[Result], seconds: float) -> dict[str, float]:
    """Return what is printed."""
    good = [result for result in results if not result.error]
    gaps = [(r.whole - r.first) / (r.n_tokens - 1) for r in good if r.n_tokens > 1]
    return {
        "requests": len(results),
        "errors": len(results) - len(good),
        "seconds": round(seconds, 3),
        "prompt t/s": round(sum(r.n_prompt for r in good) / seconds, 2),
        "generated t/s": round(sum(r.n_tokens for r in good) / seconds, 2),
        "TTFT p50 ms": round(1000 * percentile([r.first for r in good], 50), 1),
        "TTFT p95 ms": round(1000 * percentile([r.first for r in good], 95), 1),
        "per token p50 ms": round(1000 * percentile(gaps, 50), 2),
        "per token p95 ms": round(1000 * percentile(gaps, 95), 2),
    }


def main() -> int:
    """Run the load and print the report; returns 1 if any request has failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="of the server, without /v1")
    parser.add_argument("--api-key", default="")
    parser.add_argument("--model", default="any", help="name of the model, for servers that have several")
    parser.add_argument("--clients", type=int, default=16, help="requests at a time")
    parser.add_argument("--requests", type=int, default=64, help="requests in all")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--shared", type=int, default=0, help="tokens with which all prompts begin")
    parser.add_argument("--tokens", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, help="by default the server's")
    parser.add_argument("--min-id", type=int, default=100, help="smallest token id of prompts")
    parser.add_argument("--max-id", type=int, default=1000, help="one more than the largest")
    parser.add_argument("--seed", type=int, default=None, help="of the prompts; by default they are new each time")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a request may take")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    args = parser.parse_args()
    results, seconds = asyncio.run(run(args))
    told = report(results, seconds)
    print(json.dumps(told) if args.json else "\n".join(f"{name:18} {value:g}" for name, value in told.items()))
    for error in sorted({result.error for result in results if result.error}):
        print(f"error: {error}")
    return 1 if told["errors"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
