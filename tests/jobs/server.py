"""A server as users start it, and the ways that a test talks to it."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from job import ranks_of, start


class Server:
    """A running server; use it as a context.

    Attributes:
        url: without a path.
        ranks: process ids, rank 0 first.
    """

    def __init__(self, *arguments: object, n_ranks: int = 2, env: dict[str, str] | None = None) -> None:
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        self.job = start(["serve", "--port", 0, "-t", 1, "--log-file", self.log, *arguments], n_ranks, env=env)
        self.n_ranks = n_ranks
        self.url, self.host, self.port = "", "127.0.0.1", 0

    def __enter__(self) -> Server:
        began = time.monotonic()
        while not self.url:
            found = re.search(r"is ready at (\S+)", self.log.read_text())
            if found:
                self.url = found[1]
                self.port = int(self.url.rpartition(":")[2]) if self.url.startswith("http:") else 0
            elif self.job.poll() is not None or time.monotonic() - began > 60:
                self.stop()
                pytest.fail(f"the server did not start: {self.log.read_text()}")
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self.log.unlink(missing_ok=True)

    @property
    def ranks(self) -> list[int]:
        return ranks_of(self.job, self.n_ranks)

    def stop(self) -> None:
        if self.job.poll() is None:
            os.killpg(self.job.pid, signal.SIGKILL)
        self.job.communicate()

    def wait(self, limit: float = 20.0) -> int:
        """Return the exit code of a server that has been told to end."""
        try:
            self.job.wait(limit)
        except subprocess.TimeoutExpired:
            self.stop()
            pytest.fail(f"the server did not end within {limit} s: {self.log.read_text()[-2000:]}")
        return self.job.returncode

    # -- HTTP ------------------------------------------------------------------------------------------------------

    def ask(
        self, path: str, body: Any = None, method: str = "", headers: dict[str, str] | None = None
    ) -> tuple[int, Any]:
        """Return the status and the JSON of an answer; ``body`` is bytes, or a value for JSON."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method or ("GET" if body is None else "POST"), path, data, headers or {})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        kind = answer.headers.get("content-type", "")
        return answer.status, json.loads(text) if kind.startswith("application/json") else text.decode()

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection((self.host, self.port), timeout=60)

    def post_raw(self, path: str, body: Any) -> socket.socket:
        """Return a connection on which a request has been sent and nothing was read."""
        data = json.dumps(body).encode()
        sock = self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {len(data)}\r\n\r\n"
        sock.sendall(head.encode() + data)
        return sock

    def metric(self, name: str) -> float:
        """Return a metric's value."""
        _, text = self.ask("/metrics")
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])

    def wait_for(self, name: str, values: Sequence[float], limit: float = 20.0) -> float:
        """Wait until a metric has one of some values."""
        began = time.monotonic()
        while (value := self.metric(name)) not in values:
            if time.monotonic() - began > limit:
                pytest.fail(f"{name} is {value}, not one of {values}, after {limit} s")
            time.sleep(0.05)
        return value
