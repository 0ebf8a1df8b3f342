"""The routes of the server."""

from __future__ import annotations

import asyncio
import sys
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mpillama.comm.metered import Traffic
from mpillama.openai.anthropic import chat_body
from mpillama.openai.calls import Call, open_call
from mpillama.openai.context import Context
from mpillama.openai.errors import ApiError, as_bad_request, bad
from mpillama.openai.fields import Fields, parse_json
from mpillama.openai.messages import count_prompt, render_prompt
from mpillama.openai.responses import as_chat
from mpillama.openai.sampling import limit_json, sampling_json
from mpillama.openai.tools import read_tools
from mpillama.server.bridge import Bridge
from mpillama.server.front import Front
from mpillama.server.metrics import render
from mpillama.server.openapi import document
from mpillama.server.settings import Settings
from mpillama.server.slots import SlotFiles, file_name
from mpillama.server.streams import GONE, Answer, json_response, read_body

# Parsing and tokenizing, of which long prompts need a lot; it must not hold up the streams. More would only take time
# from the engine, as one thread at a time can run Python.
_N_WORKERS = 2

_CALLS = {
    "/v1/chat/completions": "/v1/chat/completions",
    "/chat/completions": "/v1/chat/completions",
    "/v1/completions": "/v1/completions",
    "/completions": "/completion",
    "/completion": "/completion",
    "/v1/embeddings": "/v1/embeddings",
    "/embeddings": "/embedding",
    "/embedding": "/embedding",
    "/v1/responses": "/v1/responses",
    "/responses": "/v1/responses",
    "/v1/messages": "/v1/messages",
}
# What makes a chat of a body whose tokens are to be counted.
_COUNTS: dict[str, Callable[[Context, Fields], Any]] = {
    "/v1/chat/completions/input_tokens": lambda context, fields: fields.body,
    "/chat/completions/input_tokens": lambda context, fields: fields.body,
    "/v1/responses/input_tokens": lambda context, fields: as_chat(fields, False, context.harmony),
    "/responses/input_tokens": lambda context, fields: as_chat(fields, False, context.harmony),
    "/v1/messages/count_tokens": lambda context, fields: chat_body(fields, stream=False),
}


@dataclass(frozen=True)
class Served:
    """What is known once the model has been loaded: what calls are read against, and what people may ask about it."""

    context: Context
    meta: dict[str, Any]
    path: str
    slot_files: SlotFiles | None = None
    traffic: Traffic = field(default_factory=Traffic)


class Api:
    """The application.

    Args:
        bridge: to the engine.
        settings: limits.
        note: called with a line about each request.

    Attributes:
        app: for the HTTP server.
        served: set when the model has been loaded.
    """

    def __init__(self, bridge: Bridge, settings: Settings, note: Callable[[str], None]) -> None:
        self.served: Served | None = None
        self._bridge, self._settings = bridge, settings
        self._workers = ThreadPoolExecutor(_N_WORKERS, "parse")
        routes = [Route(path, self._call, methods=["POST"]) for path in _CALLS]
        for names, endpoint, method in (
            (("/",), self._page, "GET"),
            (("/health", "/v1/health"), self._health, "GET"),
            (("/v1/models", "/models"), self._models, "GET"),
            (("/props",), self._props, "GET"),
            (("/slots",), self._slots, "GET"),
            (("/slots/{id_slot}",), self._slot, "POST"),
            (("/metrics",), self._metrics, "GET"),
            (("/openapi.json",), self._openapi, "GET"),
            (("/tokenize",), self._tokenize, "POST"),
            (("/detokenize",), self._detokenize, "POST"),
            (("/apply-template",), self._apply_template, "POST"),
            (tuple(_COUNTS), self._count, "POST"),
        ):
            routes += [Route(name, endpoint, methods=[method]) for name in names]
        inner = Starlette(
            routes=routes,
            exception_handlers={ApiError: _on_api_error, HTTPException: _on_http_error, ClientDisconnect: _on_gone},
        )
        self._front = Front(_Guard(inner), settings, note)

    @property
    def app(self) -> ASGIApp:
        """For the HTTP server."""
        return self._front

    def _loaded(self) -> Served:
        if self.served is None:
            raise ApiError(503, "the model is being loaded", code="loading")
        return self.served

    async def _in_worker(self, request: Request, make: Callable[[Context, Any], Any]) -> Any:
        """Read the body, and parse it where it does not hold up others."""
        context = self._loaded().context
        body = await read_body(request, self._settings)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, lambda: make(context, parse_json(body)))

    # -- generation ------------------------------------------------------------------------------------------------

    async def _call(self, request: Request) -> Any:
        try:
            self._bridge.check_room()
        except ApiError:
            # A client that still sends would lose the answer when the connection is closed.
            await read_body(request, self._settings, keep=False)
            raise
        url = _CALLS[request.url.path]
        call: Call = await self._in_worker(request, lambda context, body: open_call(context, url, body))
        return Answer(self._bridge.submit(call), self._settings)

    # -- texts and tokens ------------------------------------------------------------------------------------------

    async def _tokenize(self, request: Request) -> Response:
        return json_response(await self._in_worker(request, _tokenize))

    async def _detokenize(self, request: Request) -> Response:
        return json_response(await self._in_worker(request, _detokenize))

    async def _apply_template(self, request: Request) -> Response:
        def make(context: Context, body: Any) -> Any:
            fields = Fields(body)
            return {"prompt": render_prompt(context, fields, read_tools(fields))}

        return json_response(await self._in_worker(request, make))

    async def _count(self, request: Request) -> Response:
        path = request.url.path
        as_messages = _COUNTS[path]

        def count(context: Context, body: Any) -> int:
            return count_prompt(context, Fields(as_messages(context, Fields(body))))

        counted = {"input_tokens": await self._in_worker(request, count)}
        # Anthropic's answer has nothing else.
        return json_response(counted if "count_tokens" in path else {"object": "response.input_tokens", **counted})

    # -- about the server ------------------------------------------------------------------------------------------

    async def _page(self, request: Request) -> Response:
        page = files("mpillama.server").joinpath("index.html").read_text(encoding="utf-8")
        # The page needs nothing from elsewhere, and shows what a model has written.
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})

    async def _health(self, request: Request) -> Response:
        self._bridge.check_room(0)
        return json_response({"status": "ok"})

    async def _models(self, request: Request) -> Response:
        served = self._loaded()
        model = {
            "id": served.context.name,
            "object": "model",
            "created": 0,
            "owned_by": "mpillama",
            "meta": served.meta,
        }
        return json_response({"object": "list", "data": [model]})

    async def _props(self, request: Request) -> Response:
        served = self._loaded()
        context, tokenizer = served.context, served.context.tokenizer
        limit = limit_json(context.n_predict if context.n_predict >= 0 else None)
        params = {**sampling_json(context.sampling), **limit, "ignore_eos": context.ignore_eos}
        return json_response(
            {
                "default_generation_settings": {"n_ctx": context.n_ctx, "params": params},
                "total_slots": self._bridge.n_places,
                "model_alias": context.name,
                "model_path": served.path,
                "chat_template": context.template.source if context.template else "",
                "bos_token": tokenizer.token_text(tokenizer.bos_id) if tokenizer.bos_id is not None else "",
                "eos_token": tokenizer.token_text(tokenizer.eos_id) if tokenizer.eos_id is not None else "",
                "modalities": {"vision": False, "audio": False},
                "build_info": served.meta.get("build", ""),
            }
        )

    async def _slots(self, request: Request) -> Response:
        n_ctx, slots = self._loaded().context.n_ctx, list(self._bridge.slots)
        if request.query_params.get("fail_on_no_slot") and all(slot.busy for slot in slots):
            raise ApiError(503, "no slot is free", code="no_slot")
        return json_response([slot.as_json(n_ctx) for slot in slots])

    async def _slot(self, request: Request) -> Response:
        files = self._loaded().slot_files
        if files is None:
            raise ApiError(501, "start the server with --slot-save-path FOLDER to save and restore slots")
        bridge, number = self._bridge, request.path_params["id_slot"]
        action = request.query_params.get("action", "")
        if action == "erase":
            slot = bridge.slots.idle(number)
            tokens = slot.text.tokens
            bridge.slots.put(slot, [])
            return json_response({"id_slot": slot.id, **await bridge.on_main(lambda: files.erase(tokens))})
        if action not in ("save", "restore"):
            raise bad("action must be save, restore or erase", "action")
        name = file_name(await self._in_worker(request, lambda _, body: Fields(body).required_string("filename")))
        if action == "save":
            slot = bridge.slots.get(number)
            tokens = list(slot.text.tokens)
            told = await bridge.on_main(lambda: files.save(name, tokens))
        else:
            slot = bridge.slots.idle(number)
            tokens, told = await bridge.on_main(lambda: files.restore(name))
            # It may have been taken meanwhile; the KV is found by what the tokens are, whoever has the slot.
            if not slot.busy:
                bridge.slots.put(slot, tokens)
        return json_response({"id_slot": slot.id, "filename": name, **told})

    async def _metrics(self, request: Request) -> Response:
        traffic = self.served.traffic if self.served else Traffic()
        text = render(self._bridge.stats, self._bridge.totals, traffic, self._front.answers)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def _openapi(self, request: Request) -> Response:
        return json_response(document())


class _Guard:
    """Tells a client of a mistake of ours, and the log where it was."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noting_send(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception:
            sys.stderr.write(f"mpillama serve: {scope['method']} {scope['path']!r}:\n{traceback.format_exc()}")
            if not begun:
                error = ApiError(500, "the server has made a mistake; its log says more")
                await json_response(error.body(), 500)(scope, receive, send)


async def _on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return json_response(error.body(), error.status)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = "there is no such path" if error.status_code == 404 else f"{request.method} is not for this path"
    response = json_response(ApiError(error.status_code, f"{message}; see /openapi.json").body(), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=GONE)


def _tokenize(context: Context, body: Any) -> Any:
    fields = Fields(body)
    content, tokenizer = fields.string("content"), context.tokenizer
    ids = tokenizer.encode(content, fields.boolean("add_special"), fields.boolean("parse_special", True))
    if not fields.boolean("with_pieces"):
        return {"tokens": ids}
    return {"tokens": [{"id": id_, "piece": _piece(tokenizer.token_bytes(id_, special=True))} for id_ in ids]}


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


def _detokenize(context: Context, body: Any) -> Any:
    ids = Fields(body).array("tokens")
    if not all(isinstance(id_, int) and not isinstance(id_, bool) for id_ in ids):
        raise bad("tokens must be an array of token ids", "tokens")
    with as_bad_request("tokens"):
        return {"content": context.tokenizer.decode(ids, special=True)}
