"""Bodies: read within limits, answered whole or as events, and given up when the client goes away."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mpillama.openai.call import to_json
from mpillama.openai.errors import ApiError
from mpillama.server.bridge import Ticket
from mpillama.server.settings import Settings

GONE = 499
"""Status of an answer that nobody is there to read; nginx's number."""


def json_response(value: Any, status: int = 200) -> Response:
    """Return a JSON answer."""
    headers = {"Retry-After": "2"} if status in (429, 503) else None
    return Response(to_json(value), status, headers, "application/json; charset=utf-8")


async def read_body(request: Request, settings: Settings, keep: bool = True) -> bytes:
    """Return the body of a request; nothing of it unless it is to be kept.

    Raises:
        ApiError: it is too large, or too slow in coming.
        ClientDisconnect: the client has left.
    """
    too_large = ApiError(413, f"the body is larger than {settings.max_body} bytes", code="body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.max_body:
        raise too_large
    parts: list[bytes] = []

    async def read() -> None:
        n = 0
        async for part in request.stream():
            n += len(part)
            if n > settings.max_body:
                raise too_large
            if keep:
                parts.append(part)

    try:
        await asyncio.wait_for(read(), settings.timeout)
    except asyncio.TimeoutError:
        raise ApiError(408, "the body did not come in time") from None
    return b"".join(parts)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """The answer to a call, as JSON or as a stream of events; it ends at once when the client goes away.

    Args:
        ticket: of the call, closed at the end.
        settings: how long to wait.
    """

    def __init__(self, ticket: Ticket, settings: Settings) -> None:
        self._ticket, self._settings = ticket, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, whose body has been read."""
        writer = asyncio.ensure_future(self._stream(send) if self._ticket.call.stream else self._whole(send))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait((writer, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._ticket.close()
            for task in (writer, gone):
                task.cancel()
            results = await asyncio.gather(writer, gone, return_exceptions=True)
        error = results[0]
        # One that cannot take in its answer is as good as gone.
        if isinstance(error, Exception) and not isinstance(error, asyncio.TimeoutError | ClientDisconnect | OSError):
            raise error

    async def _whole(self, send: Send) -> None:
        call = self._ticket.call
        try:
            while not call.done and call.error is None:
                for output in await self._ticket.next():
                    call.push(output)
            value, status = call.response(), 200
        except ApiError as error:
            value, status = error.body(), error.status
        await self._send_json(send, value, status)

    async def _stream(self, send: Send) -> None:
        call = self._ticket.call
        begun = False
        try:
            while not call.done and call.error is None:
                try:
                    outputs = await asyncio.wait_for(self._ticket.next(), self._settings.ping)
                    chunks = [chunk for output in outputs for chunk in call.push(output)]
                    data = b"".join(call.frame(chunk) for chunk in chunks)
                except asyncio.TimeoutError:
                    data = b":\n\n"
                if data:
                    begun = begun or await self._begin(send)
                    await self._send_part(send, data)
            if call.error is not None:
                raise call.error
            begun = begun or await self._begin(send)
            await self._send_part(send, call.tail, more=False)
        except ApiError as error:
            if not begun:
                await self._send_json(send, error.body(), error.status)
            else:
                await self._send_part(send, call.frame(error.body()), more=False)

    async def _begin(self, send: Send) -> bool:
        headers = [
            (b"content-type", b"text/event-stream; charset=utf-8"),
            (b"cache-control", b"no-cache"),
            (b"x-accel-buffering", b"no"),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        return True

    async def _send_part(self, send: Send, data: bytes, more: bool = True) -> None:
        message = {"type": "http.response.body", "body": data, "more_body": more}
        await asyncio.wait_for(send(message), self._settings.timeout)

    async def _send_json(self, send: Send, value: Any, status: int) -> None:
        response = json_response(value, status)
        await send({"type": "http.response.start", "status": status, "headers": response.raw_headers})
        await self._send_part(send, bytes(response.body), more=False)
