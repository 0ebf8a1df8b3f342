"""Which GPU a rank computes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpillama.backends.gpu.driver import identify, load_cupy, visible_gpus
from mpillama.comm.base import World
from mpillama.errors import PeerFailure, UsageError, UserError


@dataclass(frozen=True)
class GpuWish:
    """What a rank was told: ``kind`` is ``cuda``, ``hip``, or "" for a rank without a GPU; ``index`` None: any."""

    kind: str = ""
    index: int | None = None


def choose_gpu(wishes: Sequence[GpuWish], world: World, share: bool) -> tuple[int, str]:
    """Return the number of this rank's GPU among those that it sees, and what tells it from others; 0 and "" if none.

    A rank that may take any takes its place among the ranks of its host that have a GPU, modulo the number of GPUs.
    That is right both where every rank of a host sees all of its GPUs and where the scheduler shows each only its own.

    Args:
        wishes: of all ranks; where there is a GPU among them, all ranks call this together.
        world: all ranks.
        share: several ranks may have the same GPU.

    Raises:
        UserError: this rank sees no such GPU, or lacks what it takes to use one.
        UsageError: ranks would share a GPU and ``share`` is not set.
        PeerFailure: another rank sees no GPU.
    """
    problem: UserError | None = None
    index, identity = 0, ""
    wish, here = wishes[world.rank], world.hosts[world.rank]
    if wish.kind:
        try:
            cupy = load_cupy(wish.kind)
            count = visible_gpus(cupy)
            place = sum(bool(wishes[rank].kind) and world.hosts[rank] == here for rank in range(world.rank))
            index = place % count if wish.index is None else wish.index
            if index >= count:
                raise UserError(
                    f"{wish.kind}:{index} is not visible, there {'is' if count == 1 else 'are'} {wish.kind}:0"
                    + (f" to {wish.kind}:{count - 1}" if count > 1 else "")
                    + "; see mpillama --list-devices, and what the scheduler shows to each rank"
                )
            identity = identify(cupy, index)
        except UserError as error:
            problem = error
    # All ranks learn of a failure before any of them could wait for one that is gone.
    everyone = world.bcast(world.gather((here, identity, problem and str(problem))))
    failed = next((rank for rank, (_, _, said) in enumerate(everyone) if said), None)
    if problem is not None:
        # What all of them lack is told once.
        if world.rank != failed:
            raise PeerFailure(problem.exit_code)
        raise problem
    if failed is not None:
        raise PeerFailure(1)
    owners: dict[tuple[str, str], int] = {}
    for rank, (host, gpu, _) in enumerate(everyone):
        first = owners.setdefault((host, gpu), rank) if gpu else rank
        if first != rank and not share:
            raise UsageError(
                f"ranks {first} and {rank} would share a GPU of {host}: start as many ranks on a host as it has GPUs, "
                "name other devices with -dev, or set MPILLAMA_SHARE_GPUS=1"
            )
    return index, identity
