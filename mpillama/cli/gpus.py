"""Which GPU a rank computes on."""

from __future__ import annotations

from mpillama.backends.gpu.driver import identify, load_cupy, visible_gpus
from mpillama.comm.base import World
from mpillama.errors import PeerFailure, UsageError, UserError


def choose_gpu(kind: str, world: World, share: bool) -> int:
    """Return the number of this rank's GPU among those that it sees: its rank within the host, modulo their number.

    That is right both where every rank of a host sees all of its GPUs and where the scheduler shows each only its own.

    Args:
        kind: ``cuda`` or ``hip``.
        world: all ranks.
        share: several ranks may have the same GPU.

    Raises:
        UserError: this rank sees no GPU, or lacks what it takes to use one.
        UsageError: ranks would share a GPU and ``share`` is not set.
        PeerFailure: another rank sees no GPU.
    """
    problem: UserError | None = None
    index, identity = 0, ""
    try:
        cupy = load_cupy(kind)
        index = world.local_rank % visible_gpus(cupy)
        identity = identify(cupy, index)
    except UserError as error:
        problem = error
    # All ranks learn of a failure before any of them could wait for one that is gone.
    everyone = world.bcast(world.gather((world.hosts[world.rank], identity, problem and str(problem))))
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
        first = owners.setdefault((host, gpu), rank)
        if first != rank and not share:
            raise UsageError(
                f"ranks {first} and {rank} would share a GPU of {host}: start as many ranks on a host as it has GPUs, "
                "or set MPILLAMA_SHARE_GPUS=1"
            )
    return index
