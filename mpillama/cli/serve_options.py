"""Flags of `serve`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from mpillama.cli import values
from mpillama.cli.options import Option
from mpillama.cli.serving_options import ENGINE, check_engine
from mpillama.errors import UsageError


def api_keys(text: str) -> tuple[str, ...]:
    """Parse keys separated by commas."""
    return tuple(key for key in (part.strip() for part in text.split(",")) if key)


_SERVER = (
    Option(
        ("--host",),
        "address to listen on, or a path ending in .sock for a Unix socket",
        str,
        "127.0.0.1",
        "HOST",
        "LLAMA_ARG_HOST",
    ),
    Option(
        ("--port",), "port to listen on, 0 = any free one", values.integer(0, 65535), 8080, "PORT", "LLAMA_ARG_PORT"
    ),
    Option(
        ("--api-key",),
        "keys of which clients must give one, separated by commas; can be repeated",
        api_keys,
        (),
        "KEY",
        "LLAMA_API_KEY",
        repeat=True,
        shown="none: who reaches the address may use it",
    ),
    Option(
        ("--api-key-file",),
        "file with such keys, one a line; lines that begin with # are comments",
        values.path,
        None,
        "FNAME",
        "LLAMA_ARG_API_KEY_FILE",
    ),
    Option(("-a", "--alias"), "name of the model for clients", str, "", "NAME", "LLAMA_ARG_ALIAS", shown="the model's"),
    Option(
        ("-to", "--timeout"),
        "seconds that a client may take to send a request or to take in an answer",
        values.integer(1),
        3600,
        env="LLAMA_ARG_TIMEOUT",
    ),
    Option(
        ("--slot-save-path",),
        "folder, seen by all ranks, in which clients may save the KV of slots, and from which they may restore it",
        values.path,
        None,
        "PATH",
        shown="clients cannot",
    ),
    Option(("--max-queue",), "requests that may wait; more are told to come back later", values.integer(0), 1000),
    Option(("--max-body",), "size of a request in MiB", values.integer(1, 4096), 32),
    Option(
        ("--grace",),
        "seconds that running requests get to finish after SIGTERM, SIGUSR1 or Ctrl-C",
        values.integer(0),
        30,
    ),
)

# In a server --timeout is llama.cpp's, about clients; that of the ranks has only its longer name.
_ENGINE = (replace(option, names=("--rank-timeout",)) if option.dest == "rank_timeout" else option for option in ENGINE)
SERVE = (*(replace(option, group="server") for option in _SERVER), *_ENGINE)


def check_serve(namespace: Namespace) -> None:
    """Raise UsageError for flags of a server that do not go together."""
    check_engine(namespace)
    if namespace.slot_save_path and namespace.deterministic:
        raise UsageError("--slot-save-path and --deterministic exclude each other: give one of them")
    if namespace.slot_save_path and (namespace.dp or 1) > 1:
        raise UsageError(f"--slot-save-path needs one replica, but there is --dp {namespace.dp}: give one of them")
