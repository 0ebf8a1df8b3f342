"""Will it fit? Asked before anything is loaded, and answered the same way on every rank."""

from __future__ import annotations

from pathlib import Path

from mpillama.backends.base import KV_BLOCK
from mpillama.cli.progress import format_bytes
from mpillama.comm.base import World
from mpillama.errors import PeerFailure, UserError

# What a rank needs beside its weights and its KV cache: buffers of a step, and the dequantized rows of a product.
WORKSPACE = 128 << 20
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


def _places(world: World, own: int) -> list[tuple[str, list[int], int]]:
    """Return each host, or each rank's device, with its ranks and the bytes that are free there."""
    free = world.bcast(world.gather(own or available_memory()))
    names = [f"the GPU of rank {rank} on {host}" if own else host for rank, host in enumerate(world.hosts)]
    found = []
    for name in dict.fromkeys(names):
        ranks = [rank for rank in range(world.size) if names[rank] == name]
        found.append((name, ranks, min(free[rank] for rank in ranks)))
    return found


def fits_easily(world: World, needed: list[int], own: int = 0) -> bool:
    """Return whether so many bytes for each rank leave a part of the memory to others, everywhere; see `fit_memory`."""
    return all(
        sum(needed[rank] + WORKSPACE for rank in ranks) <= room * _OWN_CHOICE for _, ranks, room in _places(world, own)
    )


def fit_memory(world: World, weights: list[int], kv: list[int], n_kv: int, n_kv_min: int, own: int = 0) -> int:
    """Return how many tokens the KV cache can hold where each host, or each rank's device, has room; at best ``n_kv``.

    Args:
        world: of all ranks.
        weights: bytes of each rank's weights.
        kv: bytes of each rank's KV cache for ``n_kv`` tokens.
        n_kv: tokens wanted.
        n_kv_min: with fewer than these there is no use in starting.
        own: bytes free on this rank's own device; 0: it computes in the host's memory, as do all others.

    Raises:
        UserError: on rank 0, naming the host, what is needed and what would fit; the other ranks raise PeerFailure.
    """
    granted = n_kv
    for place, ranks, room in _places(world, own):
        fixed = sum(weights[rank] + WORKSPACE for rank in ranks)
        cache = sum(kv[rank] for rank in ranks)
        if fixed + cache <= room:
            continue
        per_block = max(1, cache * KV_BLOCK // n_kv)
        largest = (room - fixed) // per_block * KV_BLOCK
        # A cache of our own choice leaves a part of the memory to others.
        modest = int((room * _OWN_CHOICE - fixed) // per_block) * KV_BLOCK
        if n_kv_min < n_kv and modest >= n_kv_min:
            granted = min(granted, modest)
            continue
        advice = (
            f"the largest context that fits is -c {largest}"
            if largest >= KV_BLOCK
            else f"use more {'GPUs' if own else 'hosts'}, or a model with fewer bits per weight"
        )
        error = UserError(
            f"{place} has {format_bytes(room)} free, but {'it needs' if own else 'its ranks need'} "
            f"{format_bytes(fixed)} for weights and work and {format_bytes(cache)} for a KV cache of {n_kv} tokens; "
            f"{advice}"
        )
        if world.rank:
            raise PeerFailure(error.exit_code, error.line)
        error.told = True
        raise error
    return granted
