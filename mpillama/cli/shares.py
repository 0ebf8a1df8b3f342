"""The share of the model that each rank gets: given, measured, or by free memory."""

from __future__ import annotations

from collections.abc import Sequence

from mpillama.backends.base import Backend
from mpillama.bench.speed import measure_speed, shares_of
from mpillama.cli.memory import available_memory
from mpillama.comm.base import World, from_root
from mpillama.errors import UsageError
from mpillama.grid import Grid
from mpillama.layout import check_weights


def choose_shares(
    given: tuple[float, ...] | str | None, world: World, grid: Grid, backend: Backend
) -> tuple[float, ...]:
    """Return a share for each rank of a replica, all replicas being alike; all ranks call this together.

    Args:
        given: the shares; ``auto`` for shares by measured speed, ``memory`` by what is free on the rank's host, None
            for equal ones.
        world: of all ranks.
        grid: of the ranks.
        backend: of this rank.

    Raises:
        UsageError: shares that do not fit the ranks (PeerFailure on other ranks than 0).
    """
    if given == "auto" and world.size > 1:
        # All at once, as they will compute: ranks of a host share its memory.
        world.bcast(None)
        speeds = world.gather(measure_speed(backend, world.local_size))
        return from_root(world, lambda: _fold(shares_of(speeds), grid))
    if given == "memory":
        # Ranks of a host each see all of its memory.
        room = _fold(world.gather(available_memory() / world.local_size), grid)
    else:
        room = given_shares(None if given == "auto" else given)

    def check() -> tuple[float, ...]:
        shares = check_weights(room, grid.replica_size)
        grid.stage_weights(shares)
        return shares

    return from_root(world, check)


def _fold(shares: Sequence[float], grid: Grid) -> tuple[float, ...]:
    """Return the mean share of the ranks at the same place in each replica; none on the ranks that have not got any."""
    n = grid.replica_size if shares else 0
    return tuple(sum(shares[place::n]) / grid.dp for place in range(n))


def given_shares(given: tuple[float, ...] | str | None) -> tuple[float, ...]:
    """Return shares that are given as numbers, none for equal ones.

    Raises:
        UsageError: they are to be found out by a running job.
    """
    if isinstance(given, str):
        raise UsageError(f"-ts {given} is found out by the ranks of a run; here give shares as numbers, e.g. -ts 3,1")
    return given or ()
