"""tests/run_mpi.py and tests/mpi/conftest.py, run on sessions that fail in every way a rank can fail."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

TESTS = Path(__file__).parents[1]
HEADER = "import os, signal, sys, time, pytest\nfrom mpi4py import MPI\nworld = MPI.COMM_WORLD\nrank = world.rank\n"


class Outcome(NamedTuple):
    code: int
    output: str
    seconds: float


Harness = Callable[..., Outcome]


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    """Runs a test file's text on n ranks."""
    if not (Path(sys.executable).with_name("mpirun").exists() or shutil.which("mpirun")):
        pytest.skip("no mpirun beside python nor on PATH")
    shutil.copy(TESTS / "mpi" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    runner = [sys.executable, str(TESTS / "run_mpi.py")]
    # The plugins the harness needs and no others: most of the time goes into starting pytest.
    environ = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    plugins = ["-p", "pytest_mpi", "-p", "pytest_timeout"]

    def run(text: str, n: int = 3, limit: float = 60.0, *args: str) -> Outcome:
        (tmp_path / "test_it.py").write_text(HEADER + text)
        start = time.monotonic()
        job = subprocess.run(
            [*runner, "-n", str(n), "--limit", str(limit), "--", str(tmp_path), *plugins, *args],
            env=environ,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            cwd=tmp_path,
        )
        return Outcome(job.returncode, job.stdout + job.stderr, time.monotonic() - start)

    return run


def test_passing_session_shows_rank_0_only(harness: Harness) -> None:
    out = harness("def test_a():\n    assert world.allreduce(rank) == 3\n\ndef test_b():\n    os.write(2, b'noise')\n")
    assert out.code == 0, out.output
    assert out.output.rstrip().splitlines()[-1].strip("= ").startswith("2 passed in")
    assert out.output.count("test session starts") == 1
    assert "run_mpi" not in out.output


def test_rank_that_asserts_while_others_wait(harness: Harness) -> None:
    out = harness("def test_a():\n    assert rank != 1, 'odd one out'\n    world.Barrier()\n")
    assert out.code != 0
    assert out.seconds < 20
    assert "rank 1: failed test_it.py::test_a (call): test_it.py:6: AssertionError: odd one out" in out.output
    assert "rank 0: was in test_it.py::test_a" in out.output
    assert ">       assert rank != 1, 'odd one out'" in out.output  # rank 1's own report


def test_rank_0_asserts_while_others_wait(harness: Harness) -> None:
    out = harness("def test_a():\n    print('said before')\n    assert rank != 0\n    world.Barrier()\n")
    assert out.code != 0
    assert out.seconds < 20
    assert "rank 0: failed test_it.py::test_a (call)" in out.output
    assert "said before" in out.output
    assert "rank 2: was in test_it.py::test_a" in out.output


def test_failure_of_one_rank_fails_the_test_on_all_and_the_session_goes_on(harness: Harness) -> None:
    text = (
        "def test_a():\n    assert rank != 2, 'only here'\n\n"
        "def test_b():\n    assert world.allreduce(1) == 3\n\n"
        "@pytest.fixture\ndef broken():\n    assert rank != 1, 'no fixture'\n\n"
        "def test_c(broken):\n    world.Barrier()\n\n"
        "def test_d():\n    if rank == 0:\n        pytest.skip('not me')\n"
    )
    out = harness(text)
    assert out.code == 1, out.output
    assert re.search(r"^=+ 2 failed, 1 passed, 1 error in .*=$", out.output, re.MULTILINE)
    assert "rank 2: failed test_it.py:6: AssertionError: only here" in out.output
    assert "rank 1: failed test_it.py:13: AssertionError: no fixture" in out.output
    assert "rank 0: skipped Skipped: not me" in out.output
    assert "rank 2: failed test_it.py::test_a (call)" in out.output  # run_mpi's summary


@pytest.mark.parametrize("sig", ["SIGKILL", "SIGSEGV"])
def test_rank_that_dies(harness: Harness, sig: str) -> None:
    out = harness(
        f"def test_a():\n    if rank == 1:\n        os.kill(os.getpid(), signal.{sig})\n    world.Barrier()\n"
    )
    assert out.code != 0
    assert out.seconds < 20
    assert "run_mpi: FAILED on 3 ranks" in out.output
    assert "rank 1: was in test_it.py::test_a" in out.output
    if sig == "SIGSEGV":
        assert "----- stacks of rank 1 -----\nFatal Python error: Segmentation fault" in out.output


def test_hang_runs_into_the_limit_shows_where_and_leaves_nothing_behind(harness: Harness, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    pids.mkdir()
    text = (
        "def stuck_here():\n    time.sleep(100)\n\n"
        "def test_a():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"    open({str(pids)!r} + f'/{{os.getpid()}}', 'w').close()\n"
        "    if rank == 1:\n        stuck_here()\n    world.Barrier()\n"
    )
    out = harness(text, 2, 4.0)
    assert out.code == 124
    assert out.seconds < 15
    assert "not done after 4 s" in out.output
    assert "in stuck_here" in out.output.partition("----- stacks of rank 1 -----")[2]

    seen = [int(path.name) for path in pids.iterdir()]
    assert len(seen) == 2
    deadline = time.monotonic() + 5  # a killed process may take a moment to go
    while alive := [pid for pid in seen if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < deadline, f"still there: {alive}"
        time.sleep(0.05)


def test_timeout_of_one_test_ends_the_job(harness: Harness) -> None:
    text = "@pytest.mark.timeout(2)\ndef test_a():\n    if rank == 1:\n        world.recv(source=0)\n"
    out = harness(text, 2)
    assert out.code != 0
    assert out.seconds < 20
    assert "Timeout" in out.output


def test_ranks_that_collect_different_tests(harness: Harness) -> None:
    out = harness("if rank == 1:\n    def test_more():\n        pass\n\ndef test_a():\n    world.Barrier()\n")
    assert out.code != 0
    assert out.seconds < 20
    assert "the ranks collected different tests" in out.output


def test_collection_error_on_one_rank(harness: Harness) -> None:
    out = harness("assert rank != 1, 'cannot import'\n\ndef test_a():\n    world.Barrier()\n")
    assert out.code != 0
    assert out.seconds < 20
    assert "cannot import" in out.output


def test_rank_that_leaves_early(harness: Harness) -> None:
    out = harness("def test_a():\n    if rank == 1:\n        os._exit(0)\n    world.Barrier()\n")
    assert out.code != 0
    assert out.seconds < 70
    assert "run_mpi: FAILED on 3 ranks" in out.output


def test_nothing_collected_is_not_a_success(harness: Harness) -> None:
    assert harness("def test_a():\n    pass\n", 2, 60.0, "-k", "no_such_test").code == 5
