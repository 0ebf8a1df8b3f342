"""`mpillama serve`: OpenAI's API and a chat page over HTTP."""

from __future__ import annotations

from argparse import Namespace
from typing import TYPE_CHECKING

from mpillama.cli.engine_session import Service, run_engine
from mpillama.cli.progress import Log
from mpillama.comm.base import World
from mpillama.spmd import Interrupts

if TYPE_CHECKING:
    from mpillama.cli.serve_http import HttpServer


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    log = Log(args, world.rank)
    opened: list[HttpServer] = []

    def before() -> None:
        # Here, because the other ranks need none of it, and a file system may have thousands of them to serve.
        from mpillama.cli.serve_http import HttpServer

        opened.append(HttpServer(args, log))

    def body(service: Service) -> int:
        return opened[0].serve(service, interrupts)

    return run_engine(args, world, interrupts, log, body, before, replicas=not args.slot_save_path)
