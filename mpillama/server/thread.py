"""The thread of the sockets."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpillama.errors import UserError
from mpillama.server.bridge import Bridge
from mpillama.server.settings import Settings

# How long answers may take to leave when everything else has ended.
_FLUSH_SECONDS = 5


def listen(host: str, port: int) -> tuple[socket.socket, str]:
    """Open a listening socket; returns it with the URL under which it is reached.

    Args:
        host: name or address, or a path that ends in ``.sock`` for a Unix socket only its owner can use.
        port: 0 for any free one.

    Raises:
        UserError: the address cannot be had.
    """
    try:
        if host.endswith(".sock"):
            return _listen_unix(Path(host))
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
            sock.listen(2048)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host} port {port}: {reason}; choose others with --host and --port"
        ) from None
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    return sock, f"http://{shown}:{sock.getsockname()[1]}"


def _listen_unix(path: Path) -> tuple[socket.socket, str]:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            try:
                sock.connect(str(path))
            except ConnectionRefusedError:
                # Left over by a server that was killed.
                path.unlink()
                sock.close()
                sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.bind(str(path))
        path.chmod(0o600)
        sock.listen(2048)
    except OSError:
        sock.close()
        raise
    return sock, f"http+unix://{path}"


class _Connection(H11Protocol):
    """A connection that is closed if it stays without a request; uvicorn's own timer begins after the first one."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._idle = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        # The timer would keep the connection, and what has come over it, in memory until it goes off.
        self._idle.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        # uvicorn declares it as never None, and sets it to None first.
        cycle: object = self.cycle
        if cycle is None and not self.transport.is_closing():
            self.transport.abort()


class HttpThread:
    """Serves an application on a socket, on a thread of its own.

    Args:
        app: the application.
        sock: a listening socket.
        bridge: told of the event loop.
        settings: limits of connections.
    """

    def __init__(self, app: ASGIApp, sock: socket.socket, bridge: Bridge, settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            http=_Connection,
            ws="none",
            loop="asyncio",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            log_level="critical",
            access_log=False,
            server_header=False,
            limit_concurrency=settings.max_connections,
            timeout_keep_alive=int(settings.idle),
            timeout_graceful_shutdown=_FLUSH_SECONDS,
        )
        self._server, self._sock, self._bridge = uvicorn.Server(config), sock, bridge
        self._began = threading.Event()
        # A daemon, so that nothing a client does can keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    def start(self) -> None:
        """Begin to serve; returns when the event loop runs."""
        self._thread.start()
        self._began.wait()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._bridge.open()
        self._began.set()
        await self._server.serve([self._sock])

    def stop(self) -> None:
        """Let answers that are under way leave, and end."""
        self._server.should_exit = True
        self._thread.join(2 * _FLUSH_SECONDS)
