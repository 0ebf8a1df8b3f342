"""Clusters that several tests share: starting one costs more than most tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from machines import MPILLAMA, Hosts, Slurm, is_open_mpi, slurm, two_hosts


@pytest.fixture(scope="package")
def cluster() -> Iterator[Slurm]:
    """A Slurm of two nodes."""
    if is_open_mpi():
        pytest.skip("Slurm of Debian has PMI 2, which Open MPI 5 does not speak")
    with slurm() as made:
        made.env |= {"MPILLAMA": MPILLAMA, "MPILLAMA_PMI": "pmi2", "OMP_NUM_THREADS": "1"}
        yield made


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts, joined by a network of their own."""
    with two_hosts() as made:
        yield made
