"""The links of a pipeline: residuals go from stage to stage, logits from the last stage back to the first rank."""

from __future__ import annotations

from dataclasses import dataclass

from mpillama.comm.base import Link, Team
from mpillama.grid import Grid


@dataclass(frozen=True)
class Pipe:
    """This rank's ends of the links of its pipeline; None where there is nobody at the other end.

    Attributes:
        before: to the rank that hands on its residual to this one.
        after: to the rank that this one hands its residual on to.
        head: of the pipeline's first rank, to the one that sends it the logits.
        leader: of the first rank of the last stage, to the pipeline's first rank.
    """

    before: Link | None = None
    after: Link | None = None
    head: Link | None = None
    leader: Link | None = None


def open_pipe(world: Team, grid: Grid) -> Pipe:
    """Return this rank's links; residuals travel between ranks of the same index."""
    place = grid.place(world.rank)
    if grid.pp == 1:
        return Pipe()

    def link(stage: int, index: int) -> Link:
        return world.link(grid.rank_at(place.replica, stage, index))

    last = grid.pp - 1
    return Pipe(
        before=link(place.stage - 1, place.index) if place.stage > 0 else None,
        after=link(place.stage + 1, place.index) if place.stage < last else None,
        head=link(last, 0) if (place.stage, place.index) == (0, 0) else None,
        leader=link(0, 0) if (place.stage, place.index) == (last, 0) else None,
    )
