"""The contract of groups and worlds, for one rank alone and for threads."""

import threading

import pytest

from comm_contract import CONTRACT
from mpillama.comm.solo import SoloWorld
from mpillama.comm.threads import run_threads


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_solo(check):
    check(SoloWorld())


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_threads(check, n_ranks):
    run_threads(n_ranks, check)


def test_a_failing_thread_ends_the_others():
    def main(world):
        if world.rank == 1:
            raise ValueError("rank 1 is ill")
        world.bcast(None)

    with pytest.raises(ValueError, match="rank 1 is ill"):
        run_threads(3, main)
    assert threading.active_count() < 20
