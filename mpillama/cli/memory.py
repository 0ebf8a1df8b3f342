"""Will it fit? Asked before anything is loaded, and answered the same way on every rank."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpillama.backends.base import KV_BLOCK
from mpillama.cli.progress import format_bytes
from mpillama.comm.base import World, from_root
from mpillama.errors import PeerFailure, UserError

# What a rank on a CPU needs beside its weights and its KV cache; GPUs tell it (`GpuBackend.work_bytes`).
WORKSPACE = 128 << 20
# GPUs that are told of one by one.
_FEW = 8
# Of the free memory, at most so much is taken for a KV cache whose size nobody has asked for.
_OWN_CHOICE = 0.8


def available_memory() -> int:
    """Return the bytes that this process may still use: what the host has free, or the batch system's limit."""
    free = 1 << 62
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
        group = Path("/proc/self/cgroup").read_text().split("::", 1)[1].split("\n", 1)[0].lstrip("/")
    except (OSError, ValueError, IndexError):
        # Another system than Linux, or an old kind of control group: then only what is known counts.
        return free
    folder = Path("/sys/fs/cgroup", group)
    for place in (folder, *folder.parents):
        try:
            limit = int((place / "memory.max").read_text())
            free = min(free, limit - int((place / "memory.current").read_text()))
        except (OSError, ValueError):
            # No limit at this level ("max"), or no such file.
            continue
    return free


@dataclass(frozen=True)
class _Place:
    """A host, or one rank's device: its ranks, the bytes that are free there, and those that its ranks work in."""

    name: str
    ranks: tuple[int, ...]
    room: int
    work: int
    is_gpu: bool


def _places(world: World, own: int, work: int = WORKSPACE) -> list[_Place]:
    """Return all hosts and devices; ``own`` are the bytes free on this rank's device, 0 if it computes on its host."""
    free = world.bcast(world.gather((own or available_memory(), own > 0, work)))
    names = [
        f"the GPU of rank {r} on {world.hosts[r]}" if gpu else world.hosts[r] for r, (_, gpu, _) in enumerate(free)
    ]
    found = []
    for name in dict.fromkeys(names):
        ranks = tuple(rank for rank in range(world.size) if names[rank] == name)
        room, used = min(free[rank][0] for rank in ranks), sum(free[rank][2] for rank in ranks)
        found.append(_Place(name, ranks, room, used, free[ranks[0]][1]))
    return found


def fits_easily(world: World, needed: list[int], own: int = 0, work: int = WORKSPACE) -> bool:
    """Return whether so many bytes for each rank leave a part of the memory to others, everywhere; see `fit_memory`."""
    return all(
        sum(needed[rank] for rank in place.ranks) + place.work <= place.room * _OWN_CHOICE
        for place in _places(world, own, work)
    )


def check_memory(world: World, need: int, what: str, own: int = 0) -> None:
    """Make sure that the ranks of each host, or each GPU, find room for ``need`` bytes, rather than be killed.

    Args:
        world: of all ranks.
        need: of this rank.
        what: it is for.
        own: see `fit_memory`.

    Raises:
        UserError: on all ranks, naming the host and what there is too little room for.
    """
    needs, places = world.bcast(world.gather(need)), _places(world, own)

    def check() -> None:
        for place in places:
            needed = sum(needs[rank] for rank in place.ranks)
            if needed > place.room:
                raise UserError(
                    f"{what} needs {needed / 1e9:.1f} GB on {place.name}, where {place.room / 1e9:.1f} GB are free; "
                    "take more hosts, a smaller type or model, or a shorter context"
                )

    from_root(world, check)


def fit_memory(
    world: World,
    weights: list[int],
    kv: list[int],
    n_kv: int,
    n_kv_min: int,
    own: int = 0,
    work: int = WORKSPACE,
    say: Callable[[str], object] = str,
) -> int:
    """Return how many tokens the KV cache can hold where each host, or each rank's device, has room; at best ``n_kv``.

    Args:
        world: of all ranks.
        weights: bytes of each rank's weights.
        kv: bytes of each rank's KV cache for ``n_kv`` tokens.
        n_kv: tokens wanted.
        n_kv_min: with fewer than these there is no use in starting.
        own: bytes free on this rank's own device; 0: it computes in the host's memory.
        work: bytes that this rank works in.
        say: is told what GPUs need and have: all of a few, else the one that is most short of memory.

    Raises:
        UserError: on rank 0, naming the host, what is needed and what would fit; the other ranks raise PeerFailure.
    """
    granted, largest = n_kv, n_kv
    tightest: tuple[_Place, int, int] | None = None
    needs = {
        place: (sum(weights[rank] for rank in place.ranks) + place.work, sum(kv[rank] for rank in place.ranks))
        for place in _places(world, own, work)
    }
    gpus = sorted((place for place in needs if place.is_gpu), key=lambda place: place.room - sum(needs[place]))
    for place in gpus if len(gpus) <= _FEW else gpus[:1]:
        needed = format_bytes(sum(needs[place]))
        say(f"{place.name} needs {needed} with a KV cache of {n_kv} tokens, and has {format_bytes(place.room)} free")
    for place, (fixed, cache) in needs.items():
        if fixed + cache <= place.room:
            continue
        per_block = max(1, cache * KV_BLOCK // n_kv)
        fits = max(0, (place.room - fixed) // per_block * KV_BLOCK)
        if tightest is None or fits < largest:
            tightest, largest = (place, fixed, cache), fits
        # A cache of our own choice leaves a part of the memory to others.
        granted = min(granted, int((place.room * _OWN_CHOICE - fixed) // per_block) * KV_BLOCK)
    if tightest is None or (n_kv_min < n_kv and granted >= n_kv_min):
        return granted
    place, fixed, cache = tightest
    advice = (
        f"the largest context that fits is -c {largest}"
        if largest >= KV_BLOCK
        else f"use more {'GPUs' if place.is_gpu else 'hosts'}, or a model with fewer bits per weight"
    )
    error = UserError(
        f"{place.name} has {format_bytes(place.room)} free, but {'it needs' if place.is_gpu else 'its ranks need'} "
        f"{format_bytes(fixed)} for weights and work and {format_bytes(cache)} for a KV cache of {n_kv} tokens; "
        f"{advice}"
    )
    if world.rank:
        raise PeerFailure(error.exit_code, error.line)
    error.told = True
    raise error


def least_context(args: Namespace, n_kv: int, needed: int = 1) -> int:
    """Return how few tokens the KV cache may hold, by ``--fit``.

    Args:
        args: the flags.
        n_kv: tokens wanted.
        needed: tokens without which there is no use in starting.
    """
    if args.fit == "off" or (args.ctx_size and args.fit is None):
        return n_kv
    return min(n_kv, max(needed, args.fit_ctx))
