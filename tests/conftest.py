"""What all tests share: a seed that is fresh each session and can be given back to repeat a failure."""

from __future__ import annotations

import os
import secrets
import zlib
from typing import Any

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


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The batches for which a model text was run, on any rank."""
    # Not every session of tests has use for the models.
    import mpillama.runner

    found: list[object] = []
    forward = mpillama.runner.forward

    def counted(*args: Any) -> Any:
        found.append(args[4])
        return forward(*args)

    monkeypatch.setattr("mpillama.runner.forward", counted)
    return found
