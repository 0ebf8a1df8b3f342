"""Will it fit? Asked before anything is loaded, and answered the same way on every rank."""

from __future__ import annotations

from pathlib import Path

from mpillama.backends.base import KV_BLOCK
from mpillama.cli.progress import format_bytes
from mpillama.comm.base import World
from mpillama.errors import PeerFailure, UserError

# What a rank needs beside its weights and its KV cache: buffers of a step, and the dequantized rows of a product.
WORKSPACE = 128 << 20


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


def check_memory(world: World, weights: list[int], kv: list[int], n_ctx: int, own: int = 0) -> None:
    """Make sure that each host, or each rank's device, has room.

    Args:
        world: of all ranks.
        weights: bytes of each rank's weights.
        kv: bytes of each rank's KV cache for ``n_ctx`` tokens.
        n_ctx: context of the run.
        own: bytes free on this rank's own device; 0: it computes in the host's memory, as do all others.

    Raises:
        UserError: on rank 0, naming the host, what is needed and what would fit; the other ranks raise PeerFailure.
    """
    free = world.bcast(world.gather(own or available_memory()))
    places = [f"the GPU of rank {rank} on {host}" if own else host for rank, host in enumerate(world.hosts)]
    for place in dict.fromkeys(places):
        ranks = [rank for rank in range(world.size) if places[rank] == place]
        room = min(free[rank] for rank in ranks)
        fixed = sum(weights[rank] + WORKSPACE for rank in ranks)
        cache = sum(kv[rank] for rank in ranks)
        if fixed + cache <= room:
            continue
        if world.rank:
            raise PeerFailure
        per_block = max(1, cache * KV_BLOCK // n_ctx)
        largest = (room - fixed) // per_block * KV_BLOCK
        advice = (
            f"the largest context that fits is -c {largest}"
            if largest >= KV_BLOCK
            else f"use more {'GPUs' if own else 'hosts'}, or a model with fewer bits per weight"
        )
        error = UserError(
            f"{place} has {format_bytes(room)} free, but {'it needs' if own else 'its ranks need'} "
            f"{format_bytes(fixed)} for weights and work and {format_bytes(cache)} for a KV cache of {n_ctx} tokens; "
            f"{advice}"
        )
        error.told = True
        raise error
