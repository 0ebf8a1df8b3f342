"""The world is the one that was asked for, and its collectives compute what they should."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def test_ranks_are_distinct_and_one_world(comm: Any) -> None:
    """N singletons of size 1, as a launcher of another MPI family gives, would pass many a test."""
    assert comm.allgather(comm.rank) == list(range(comm.size))
    pids = comm.allgather(os.getpid())
    assert len(set(pids)) == comm.size


def test_same_random_inputs_on_all_ranks(comm: Any, rng: np.random.Generator) -> None:
    draws = comm.allgather(rng.integers(2**62))
    assert len(set(draws)) == 1


def test_allreduce_in_place_equals_the_sum(comm: Any, rng: np.random.Generator) -> None:
    # Whole numbers small enough that float32 sums them exactly in any order.
    rows = rng.integers(-(2**12), 2**12, size=(comm.size, 1031)).astype(np.float32)
    mine = rows[comm.rank].copy()
    from mpi4py import MPI

    comm.Allreduce(MPI.IN_PLACE, mine)
    np.testing.assert_array_equal(mine, rows.sum(axis=0))
