"""What `serve` runs on rank 0 only."""

from __future__ import annotations

import ipaddress
import os
import resource
import sys
from argparse import Namespace
from dataclasses import replace

from mpillama import __version__
from mpillama.cli.api_context import api_context
from mpillama.cli.engine_session import Service
from mpillama.cli.files import read_text
from mpillama.cli.progress import Log
from mpillama.cli.prompt_cache import open_states
from mpillama.errors import UsageError
from mpillama.server.app import Api, Served
from mpillama.server.bridge import Bridge
from mpillama.server.encoder import Encoder
from mpillama.server.settings import Settings
from mpillama.server.slots import SlotFiles
from mpillama.server.thread import HttpThread, listen
from mpillama.spmd import Interrupts

_MAX_FILES = 16384
# A thread that tokenizes keeps the engine waiting for this long after each of its calls into native code.
_SWITCH_SECONDS = 0.0005


class HttpServer:
    """A server on its own thread; it listens at once, and says that it is loading until the model is there."""

    def __init__(self, args: Namespace, log: Log) -> None:
        self._args, self._log = args, log
        self._settings = Settings(
            api_keys=read_keys(args),
            timeout=args.timeout,
            max_body=args.max_body << 20,
            max_queue=args.max_queue,
            grace=args.grace,
        )
        folder = args.slot_save_path
        if folder and not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
            raise UsageError(f"--slot-save-path {folder}: is no folder that one can write to")
        _allow_many_files()
        sys.setswitchinterval(_SWITCH_SECONDS)
        sock, self._url = listen(args.host, args.port)
        self._bridge = Bridge(self._settings.max_queue)
        self._api = Api(self._bridge, self._settings, log.verbose)
        self._thread = HttpThread(self._api.app, sock, self._bridge, self._settings)
        if not self._settings.api_keys and _is_public(args.host):
            log.report(f"mpillama serve: whoever reaches {self._url} can use the model: there is no --api-key")
        self._thread.start()

    def serve(self, service: Service, interrupts: Interrupts) -> int:
        """Serve until a signal; returns the exit code."""
        model = service.loaded.model
        meta = {
            "n_vocab": model.cfg.n_vocab,
            "n_ctx": service.engine.n_ctx,
            "n_ctx_train": model.cfg.n_ctx_train,
            "n_embd": model.cfg.n_embd,
            "size": sum(info.nbytes for info in model.tensors.values()),
            "build": f"mpillama {__version__}",
        }
        encoder = Encoder(service.tokenizer, service.metadata)
        context = api_context(replace(service, tokenizer=encoder.proxy()), self._args.alias)
        folder = self._args.slot_save_path
        files = SlotFiles(folder.absolute(), open_states(service), service.engine) if folder else None
        self._api.served = Served(context, meta, model.paths[0], files, service.loaded.traffic)
        self._log.report(f"mpillama serve: {context.name} is ready at {self._url}")
        self._bridge.run(service.engines, interrupts, self._settings.grace, self._on_drain)
        self._thread.stop()
        encoder.close()
        left = len(self._bridge.tickets)
        self._log.report("mpillama serve: stopped" + (f"; {left} requests were not finished in time" if left else ""))
        return 0

    def _on_drain(self, n: int) -> None:
        self._log.report(f"mpillama serve: stopping; {n} requests have {self._settings.grace} s to finish")


def read_keys(args: Namespace) -> tuple[str, ...]:
    """Return the API keys of the flags; UsageError if their file cannot be read or has none."""
    keys: list[str] = list(args.api_key)
    if args.api_key_file:
        lines = read_text(args.api_key_file, "--api-key-file").splitlines()
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise UsageError(f"--api-key-file {args.api_key_file}: there is no key in it")
        keys += found
    return tuple(keys)


def _is_public(host: str) -> bool:
    """Whether other machines may reach an address."""
    if host.endswith(".sock") or host == "localhost":
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def _allow_many_files() -> None:
    """Let as many connections in as the system allows; the usual limit of 1024 files is less than a server may meet."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
