"""What every request passes first: CORS, API keys, and errors as JSON."""

from __future__ import annotations

import hmac
import time
from collections import Counter
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpillama.openai.errors import ApiError
from mpillama.server.settings import Settings
from mpillama.server.streams import json_response

PUBLIC = frozenset(("/", "/health", "/v1/health", "/models", "/v1/models", "/openapi.json"))
"""Paths that need no key, as in llama.cpp: who may come in must be told somewhere that a key is needed."""


class Front:
    """Wraps an application.

    Args:
        app: the application.
        settings: the API keys.
        note: called with a line about each request.
    """

    def __init__(self, app: ASGIApp, settings: Settings, note: Callable[[str], None]) -> None:
        self._app, self._note = app, note
        self._keys = tuple(key.encode() for key in settings.api_keys)
        self.answers: Counter[int] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request."""
        if scope["type"] != "http":
            return
        began = time.monotonic()
        headers = Headers(scope=scope)
        status = 0

        async def send_with_cors(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                _allow_origin(MutableHeaders(scope=message), headers)
            await send(message)

        app = self._app
        if scope["method"] == "OPTIONS":
            app = _preflight
        elif self._keys and scope["path"] not in PUBLIC and not self._knows(headers):
            message = "give an API key of this server as 'Authorization: Bearer KEY'"
            app = json_response(ApiError(401, message, code="invalid_api_key").body(), 401)
        try:
            await app(scope, receive, send_with_cors)
        finally:
            self.answers[status] += 1
            self._note(f"{scope['method']} {scope['path']!r} {status} {time.monotonic() - began:.3f} s")

    def _knows(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = (key if scheme.lower() == "bearer" else headers.get("x-api-key", "")).strip().encode()
        # All are compared, each in a time that does not tell how much of it was right.
        return any([hmac.compare_digest(given, key) for key in self._keys])  # noqa: C419


def _allow_origin(answer: MutableHeaders, headers: Headers) -> None:
    """Let pages of any origin read the answer, which is llama.cpp's default."""
    answer["Access-Control-Allow-Origin"] = headers.get("origin", "*")
    answer.append("Vary", "Origin")


async def _preflight(scope: Scope, receive: Receive, send: Send) -> None:
    headers = [
        (b"access-control-allow-credentials", b"true"),
        (b"access-control-allow-methods", b"GET, POST, DELETE, OPTIONS"),
        (b"access-control-allow-headers", b"*, Authorization, Content-Type"),
        (b"content-length", b"0"),
    ]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
