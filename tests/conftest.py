"""What all tests share: a seed that is fresh each session and can be given back to repeat a failure."""

from __future__ import annotations

import os
import secrets
import zlib

import hypothesis
import numpy as np
import pytest

SEED = "MPILLAMA_TEST_SEED"


def pytest_configure(config: pytest.Config) -> None:
    """Choose the seed of the session before its header is printed."""
    os.environ.setdefault(SEED, str(secrets.randbelow(2**32)))
    # A shared machine may stop a test for longer than Hypothesis' 200 ms.
    hypothesis.settings.register_profile("mpillama", deadline=None)
    hypothesis.settings.load_profile("mpillama")


def pytest_report_header() -> str:
    """Show how to repeat this session's random inputs."""
    return f"{SEED}={os.environ[SEED]}"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Random numbers of this test: fresh each session, the same on all ranks started by run_mpi.py."""
    # Not one stream for all tests: a test alone then repeats what it did in the whole session.
    return np.random.default_rng([int(os.environ[SEED]), zlib.crc32(request.node.nodeid.encode())])
