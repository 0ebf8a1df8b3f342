"""The grid of a run: which rank belongs to which replica, stage and tensor-parallel group. Sizes in, places out.

A run of ``dp * pp * tp`` ranks is ``dp`` replicas of the model; a replica is a pipeline of ``pp`` stages, each with a
range of the model's blocks; the ``tp`` ranks of a stage share the slices of its weights. Ranks are numbered with the
tensor-parallel index running fastest, so that those who talk most are neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpillama.errors import UsageError
from mpillama.layout import Range, split


@dataclass(frozen=True)
class Place:
    """Where a rank stands: its replica, its stage within it, and its index within the stage."""

    replica: int
    stage: int
    index: int


@dataclass(frozen=True)
class Grid:
    """``dp`` replicas of ``pp`` stages of ``tp`` ranks."""

    tp: int = 1
    pp: int = 1
    dp: int = 1

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.dp * self.pp * self.tp

    @property
    def replica_size(self) -> int:
        """Ranks of one replica."""
        return self.pp * self.tp

    @property
    def one_replica(self) -> Grid:
        """The grid within a replica, whose ranks are numbered from 0."""
        return Grid(self.tp, self.pp)

    def place(self, rank: int) -> Place:
        """Return where a rank stands."""
        stage, index = divmod(rank % self.replica_size, self.tp)
        return Place(rank // self.replica_size, stage, index)

    def rank_at(self, replica: int, stage: int, index: int) -> int:
        """Return the rank at a place."""
        return (replica * self.pp + stage) * self.tp + index

    def replica(self, number: int) -> range:
        """Return the ranks of a replica; the first of them leads it."""
        return range(number * self.replica_size, (number + 1) * self.replica_size)

    def stage_ranks(self, rank: int) -> range:
        """Return the ranks that share a stage with ``rank``: its tensor-parallel group."""
        first = rank - rank % self.tp
        return range(first, first + self.tp)

    def stage_weights(self, weights: Sequence[float]) -> tuple[tuple[float, ...], ...]:
        """Return the shares of a replica's ranks, stage by stage.

        Raises:
            UsageError: a stage has no share at all.
        """
        stages = tuple(tuple(weights[stage * self.tp : (stage + 1) * self.tp]) for stage in range(self.pp))
        for stage, shares in enumerate(stages):
            if sum(shares) <= 0:
                raise UsageError(f"-ts gives stage {stage} of the pipeline no share; give one of its ranks some")
        return stages


ONE_RANK = Grid()


def cut_blocks(n_layer: int, stages: Sequence[Sequence[float]]) -> tuple[Range, ...]:
    """Return the range of blocks of each stage, in proportion to the sum of its ranks' shares; none is empty."""
    return split(n_layer, [sum(shares) for shares in stages], grains=(1,)).ranges


def choose_grid(
    hosts: Sequence[str],
    n_layer: int,
    *,
    split_mode: str | None = None,
    tp: int | None = None,
    pp: int | None = None,
    dp: int | None = None,
) -> Grid:
    """Return the grid that flags and hosts call for.

    Without flags a replica is tensor-parallel inside a host and a pipeline across hosts, if its ranks fill several
    hosts evenly, host after host, and there is a block for each; otherwise it is tensor-parallel over all its ranks.

    Args:
        hosts: the host of each rank.
        n_layer: blocks of the model.
        split_mode: ``none``, ``layer`` (a stage for each rank), ``tensor`` (one stage), or None for the rule above.
        tp: ranks of a stage.
        pp: stages of a replica.
        dp: replicas, 1 by default; see also `host_replicas`.

    Raises:
        UsageError: the flags contradict each other, the number of ranks or the model.
    """
    n_ranks, dp = len(hosts), dp or 1
    if n_ranks % dp:
        raise UsageError(f"--dp {dp} does not divide the {n_ranks} ranks; start a multiple of {dp}")
    n = n_ranks // dp
    if split_mode == "none":
        if n > 1:
            raise UsageError(f"-sm none runs on one rank but there are {n}; start one, or use -sm layer or -sm tensor")
        tp, pp = _agreed("-sm none", tp, pp, 1, 1)
    elif split_mode == "layer":
        tp, pp = _agreed("-sm layer", tp, pp, 1, n)
    elif split_mode == "tensor":
        tp, pp = _agreed("-sm tensor", tp, pp, n, 1)
    elif tp is None and pp is None:
        pp = _host_stages(hosts[:n], n_layer)
        tp = n // pp
    elif pp is None or tp is None:
        flag, given = ("--tp", tp) if tp is not None else ("--pp", pp or 1)
        if n % given:
            raise UsageError(f"{flag} {given} does not divide the {_ranks(n, dp)}; start a multiple of {given}")
        tp, pp = (given, n // given) if pp is None else (n // given, given)
    if tp * pp != n:
        raise UsageError(f"--tp {tp} x --pp {pp} needs {tp * pp} ranks, but there are {_ranks(n, dp)}")
    if pp > n_layer:
        raise UsageError(
            f"the model has {n_layer} blocks, too few for a pipeline of {pp} stages; use --pp {n_layer} or less, "
            "or -sm tensor"
        )
    return Grid(tp, pp, dp)


def _ranks(n: int, dp: int) -> str:
    return f"{n} ranks" + (f" of each of {dp} replicas" if dp > 1 else "")


def _agreed(flag: str, tp: int | None, pp: int | None, n_tp: int, n_pp: int) -> tuple[int, int]:
    for name, given, want in (("--tp", tp, n_tp), ("--pp", pp, n_pp)):
        if given is not None and given != want:
            raise UsageError(f"{flag} means {name} {want} here, not {name} {given}; give one of the two flags")
    return n_tp, n_pp


def host_replicas(hosts: Sequence[str]) -> Grid:
    """Return the grid with a replica on each host, tensor-parallel; one replica where the hosts are filled unevenly."""
    n_hosts = _even_hosts(hosts)
    return Grid(len(hosts) // n_hosts, 1, n_hosts)


def _host_stages(hosts: Sequence[str], n_layer: int) -> int:
    """Return the number of hosts if the ranks fill them evenly, one after the other, and there are blocks; else 1."""
    n_hosts = _even_hosts(hosts)
    return n_hosts if n_hosts <= n_layer else 1


def _even_hosts(hosts: Sequence[str]) -> int:
    """Return the number of hosts if the ranks fill them evenly, one after the other; else 1."""
    n_hosts = len(set(hosts))
    if len(hosts) % n_hosts:
        return 1
    each = len(hosts) // n_hosts
    even = all(len(set(hosts[first : first + each])) == 1 for first in range(0, len(hosts), each))
    return n_hosts if even else 1
