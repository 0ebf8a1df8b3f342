"""How the weights get to the ranks: ``--load``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mpillama.comm.base import World, from_root
from mpillama.doctor.files import PARALLEL_FILES, SLOW_FILES, file_system
from mpillama.errors import UsageError
from mpillama.reading import ReadWatch


def choose_loading(wanted: str, world: World, paths: Sequence[str], virtual: bool) -> str:
    """Return ``direct`` or ``bcast``, the same on all ranks, which call this together.

    Where all ranks are on one host, its page cache serves a byte that several of them need.

    Args:
        wanted: one of these, or ``auto``.
        world: all ranks.
        paths: of the model's files.
        virtual: whether there are virtual ranks, which read for themselves.

    Raises:
        UsageError: ``bcast`` was asked for with virtual ranks (PeerFailure on other ranks than 0).
    """
    if world.size == 1:
        return "direct"
    types = world.gather({file_system(Path(path))[0] for path in paths} if wanted == "auto" else set())

    def decide() -> str:
        if wanted == "bcast" and virtual:
            raise UsageError("--load bcast does not go with --deterministic; use --load direct")
        if wanted != "auto":
            return wanted
        shared = SLOW_FILES | PARALLEL_FILES
        apart = len(set(world.hosts)) > 1 and not virtual
        return "bcast" if apart and any(found & shared for found in types) else "direct"

    return from_root(world, decide)


def speaker(world: World) -> Callable[[str], None]:
    """Return what puts a line of this rank on stderr, with its name: of what cannot wait until rank 0 can speak."""
    name = f"rank {world.rank} on {world.hosts[world.rank]}"

    def say(text: str) -> None:
        print(f"mpillama: {name}: {text}", file=sys.stderr, flush=True)

    return say


def read_watch(world: World) -> ReadWatch:
    """Return a watch over the reads of this rank that speaks on stderr."""
    return ReadWatch(speaker(world))
