"""What a server was told at its start."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Limits and secrets.

    Attributes:
        api_keys: of which a client has to give one; none: everyone may come.
        timeout: seconds that a client may take to send a request, or to take in a part of the answer.
        max_body: bytes of a request.
        max_queue: requests that may wait, beyond those that run.
        grace: seconds that running requests get when the server is told to stop.
        ping: seconds of silence after which a stream shows that it is alive.
        max_connections: at a time.
        idle: seconds after which a connection without a request is closed.
    """

    api_keys: tuple[str, ...] = ()
    timeout: float = 3600.0
    max_body: int = 32 << 20
    max_queue: int = 1000
    grace: float = 30.0
    ping: float = 15.0
    max_connections: int = 4096
    idle: float = 60.0
