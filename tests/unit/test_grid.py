"""Who stands where: grids from flags and hosts, blocks by shares, and grids that cannot be."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mpillama.cli import memory
from mpillama.cli.parser import parse
from mpillama.cli.progress import Log
from mpillama.cli.session import load, open_model
from mpillama.comm.threads import run_threads
from mpillama.errors import UsageError
from mpillama.grid import Grid, choose_grid, cut_blocks, host_replicas

sizes = st.integers(1, 6)


@given(tp=sizes, pp=sizes, dp=sizes)
def test_every_rank_has_one_place(tp, pp, dp):
    grid = Grid(tp, pp, dp)
    places = [grid.place(rank) for rank in range(grid.size)]
    assert len(set(places)) == grid.size == tp * pp * dp
    for rank, place in enumerate(places):
        assert grid.rank_at(place.replica, place.stage, place.index) == rank
        assert rank in grid.replica(place.replica)
        mates = grid.stage_ranks(rank)
        assert list(mates) == [grid.rank_at(place.replica, place.stage, index) for index in range(tp)]
        assert {places[mate].stage for mate in mates} == {place.stage}


def hosts(*counts):
    return tuple(f"node{i}" for i, n in enumerate(counts) for _ in range(n))


@pytest.mark.parametrize(
    ("where", "flags", "expected"),
    [
        (hosts(1), {}, Grid(1, 1)),
        (hosts(6), {}, Grid(6, 1)),
        (hosts(4, 4), {}, Grid(4, 2)),
        (hosts(1, 1, 1), {}, Grid(1, 3)),
        # Not even, not one host after the other, or more hosts than blocks: every weight over all ranks.
        (hosts(4, 2), {}, Grid(6, 1)),
        (hosts(1, 1) * 2, {}, Grid(4, 1)),
        (hosts(*[1] * 9), {}, Grid(9, 1)),
        (hosts(4, 4), {"split_mode": "tensor"}, Grid(8, 1)),
        (hosts(4), {"split_mode": "layer"}, Grid(1, 4)),
        (hosts(4), {"split_mode": "layer", "tp": 1}, Grid(1, 4)),
        (hosts(1), {"split_mode": "none"}, Grid(1, 1)),
        (hosts(2), {"split_mode": "none", "dp": 2}, Grid(1, 1, 2)),
        (hosts(4, 4), {"tp": 8}, Grid(8, 1)),
        (hosts(4, 4), {"tp": 2}, Grid(2, 4)),
        (hosts(8), {"pp": 2}, Grid(4, 2)),
        (hosts(6), {"tp": 3, "pp": 2}, Grid(3, 2)),
        (hosts(2, 2, 2, 2), {"dp": 2}, Grid(2, 2, 2)),
        (hosts(4, 4), {"dp": 2}, Grid(4, 1, 2)),
        (hosts(4, 4), {"dp": 4, "pp": 2}, Grid(1, 2, 4)),
    ],
)
def test_choice(where, flags, expected):
    assert choose_grid(where, 8, **flags) == expected


@pytest.mark.parametrize(
    ("n_ranks", "flags", "message"),
    [
        (3, {"tp": 2, "pp": 2}, "--tp 2 x --pp 2 needs 4 ranks, but there are 3"),
        (3, {"tp": 2}, "--tp 2 does not divide the 3 ranks"),
        (5, {"pp": 4}, "--pp 4 does not divide the 5 ranks"),
        (5, {"dp": 2}, "--dp 2 does not divide the 5 ranks"),
        (6, {"dp": 2, "tp": 2}, "--tp 2 does not divide the 3 ranks of each of 2 replicas"),
        (2, {"split_mode": "none"}, "-sm none runs on one rank but there are 2"),
        (4, {"split_mode": "tensor", "pp": 2}, "-sm tensor means --pp 1"),
        (4, {"split_mode": "layer", "tp": 2}, "-sm layer means --tp 1"),
        (9, {"split_mode": "layer"}, "8 blocks, too few for a pipeline of 9 stages"),
        (9, {"pp": 9}, "8 blocks, too few"),
    ],
)
def test_impossible_grids(n_ranks, flags, message):
    with pytest.raises(UsageError, match=message):
        choose_grid(hosts(n_ranks), 8, **flags)


@pytest.mark.parametrize(
    ("n_layer", "stages", "widths"),
    [
        (32, [[1, 1], [1, 1]], [16, 16]),
        (5, [[1], [1], [1]], [2, 2, 1]),
        (32, [[3, 3], [1, 1]], [24, 8]),
        (3, [[100], [1], [1]], [1, 1, 1]),  # every stage has a block
        (8, [[5, 2, 1], [1, 2, 5]], [4, 4]),
    ],
)
def test_blocks_follow_the_shares_of_a_stage(n_layer, stages, widths):
    ranges = cut_blocks(n_layer, stages)
    assert [stop - start for start, stop in ranges] == widths
    assert ranges[0][0] == 0
    assert [start for start, _ in ranges[1:]] == [stop for _, stop in ranges[:-1]]


def test_stages_without_a_share_are_refused():
    assert Grid(2, 2).stage_weights([1, 0, 0, 2]) == ((1, 0), (0, 2))
    with pytest.raises(UsageError, match="stage 1 of the pipeline no share"):
        Grid(2, 2).stage_weights([1, 1, 0, 0])


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (hosts(2, 2), Grid(2, 1, 2)),
        (hosts(1, 1, 1), Grid(1, 1, 3)),
        (hosts(4), Grid(4)),
        (hosts(3, 1), Grid(4)),
        (["a", "b", "a", "b"], Grid(4)),
    ],
)
def test_a_replica_on_each_host(where, expected):
    assert host_replicas(where) == expected


@pytest.mark.parametrize(
    ("flags", "free", "expected"),
    [
        ([], 4 << 30, Grid(2, 1, 2)),
        # Enough to run over both hosts, but not for a whole cache on each.
        ([], 300 << 20, Grid(2, 2)),
        (["--dp", "1"], 4 << 30, Grid(2, 2)),
        (["-sm", "tensor"], 4 << 30, Grid(4)),
        (["--tp", "1", "--dp", "2"], 4 << 30, Grid(1, 2, 2)),
    ],
)
def test_what_fits_into_each_host_runs_there(flags, free, expected, monkeypatch):
    """Where many requests are answered; the layout says so."""
    _, args = parse(["batch", "-i", "i", "-o", "o", "-np", "8", "-v", *flags], {})
    monkeypatch.setattr(memory, "available_memory", lambda: free)

    def main(world):
        world.hosts = ("a", "a", "b", "b")
        loaded, _ = load(args, world, Log(args, world.rank), lambda: (open_model(args, 4)[1], None), replicas=True)
        assert loaded.team.size == expected.replica_size
        return loaded.model.grid

    assert run_threads(4, main) == [expected] * 4
