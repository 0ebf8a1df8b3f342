"""The shares of ranks: given, by measured speed, by free memory."""

import numpy as np
import pytest

from mpillama.backends.reference import ReferenceBackend
from mpillama.bench import speed
from mpillama.bench.speed import Speed, measure_speed, shares_of
from mpillama.cli import shares as module
from mpillama.cli.shares import choose_shares
from mpillama.comm.threads import run_threads
from mpillama.errors import PeerFailure, UsageError
from mpillama.grid import Grid


def test_ranks_finish_together(rng):
    rates = np.array([1.0, 3.0, 2.0, 0.5])
    shares = shares_of([Speed(40 * rate, 900 * rate) for rate in rates])
    assert sum(shares) == pytest.approx(1.0)
    assert np.array(shares) / rates == pytest.approx([1 / rates.sum()] * 4)


def test_one_kind_of_speed_counts_half():
    """A rank that multiplies at half speed and reads as fast as the others: between the two."""
    fast, slow = shares_of([Speed(40, 900), Speed(40, 450)])
    assert 1.0 < fast / slow < 2.0


def test_noise_is_no_difference(rng):
    noise = rng.uniform(0.96, 1.0, 7)
    assert len(set(shares_of([Speed(40 * x, 900 * x) for x in noise]))) == 1
    kinds = shares_of([Speed(40 * x, 900 * x) for x in (*noise[:3], *noise[3:] / 2)])
    assert len(set(kinds)) == 2
    assert kinds[0] / kinds[6] == pytest.approx(2.0, rel=0.05)


def test_a_measurement_is_a_speed(monkeypatch):
    monkeypatch.setattr(speed, "_HOST_BYTES", 8 << 20)
    found = measure_speed(ReferenceBackend(), 1, seconds=0.05)
    assert 0.001 < found.read_gbps < 1000
    assert 0.01 < found.multiply_gmacs < 100000


def shares_on(given, grid):
    return run_threads(grid.size, lambda world: choose_shares(given, world, grid, ReferenceBackend()))


def test_all_ranks_agree_on_what_was_measured(monkeypatch):
    speeds = iter([Speed(1, 1), Speed(3, 3), Speed(1, 1)])
    monkeypatch.setattr(module, "measure_speed", lambda backend, n_sharers: next(speeds))
    found = shares_on("auto", Grid(3))
    assert sorted(found[0]) == pytest.approx([0.2, 0.2, 0.6])
    assert found == [found[0]] * 3


def test_free_memory(monkeypatch):
    rooms = iter([30, 10, 20])
    monkeypatch.setattr(module, "available_memory", lambda: next(rooms))
    found = shares_on("memory", Grid(3))
    assert sorted(found[0]) == pytest.approx([10 / 3, 20 / 3, 10])
    assert found == [found[0]] * 3


def test_replicas_are_alike(monkeypatch):
    """Their shares are the means of what was found at the same place of each."""
    room = {0: 30, 1: 10, 2: 10, 3: 20}
    monkeypatch.setattr(module, "available_memory", lambda: 1)

    def main(world):
        world.gather = lambda value, gather=world.gather: gather(room[world.rank])
        return choose_shares("memory", world, Grid(2, dp=2), ReferenceBackend())

    assert run_threads(4, main) == [(20.0, 15.0)] * 4
    assert shares_on((3.0, 1.0), Grid(2, dp=2)) == [(3.0, 1.0)] * 4


@pytest.mark.parametrize(("given", "message"), [((1.0, 2.0), "names 2 shares"), ((0.0, 0.0, 1.0, 1.0), "stage 0")])
def test_wrong_shares_are_told_by_rank_0(given, message):
    def main(world):
        with pytest.raises(PeerFailure if world.rank else UsageError, match=None if world.rank else message):
            choose_shares(given, world, Grid(2, 2), ReferenceBackend())

    run_threads(4, main)
