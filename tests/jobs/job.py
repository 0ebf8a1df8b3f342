"""Starts mpillama the way a user does: as processes, with or without mpirun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Ended:
    """How a job ended."""

    code: int
    out: str
    err: str
    seconds: float


def mpirun(n_ranks: int) -> list[str]:
    """Return the launcher's command, or nothing for a run without one; skips the test where there is no launcher."""
    if n_ranks == 0:
        return []
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("there is no mpirun; pip install mpich provides one")
    return [found, "-n", str(n_ranks)]


def launcher() -> str:
    """Return what mpirun says of itself."""
    return subprocess.run([*mpirun(1)[:1], "--version"], capture_output=True, text=True, check=False).stdout


def start(
    arguments: Sequence[object],
    n_ranks: int = 0,
    env: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "mpillama"),
) -> subprocess.Popen[str]:
    """Start a job in a process group of its own; ``n_ranks`` 0: without mpirun."""
    command = [*mpirun(n_ranks), sys.executable, *program, *map(str, arguments)]
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("LLAMA_ARG_", "PMI_", "OMPI_COMM"))
    }
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**inherited, **(env or {})},
        start_new_session=True,
    )


def finish(job: subprocess.Popen[str], limit: float = 60.0) -> Ended:
    """Wait for a job; one that outlives the limit is killed, and fails the test."""
    began = time.monotonic()
    try:
        out, err = job.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, 9)
        out, err = job.communicate()
        pytest.fail(f"the job did not end within {limit} s; stdout: {out[-500:]} stderr: {err[-1500:]}")
    return Ended(job.returncode, out, err, time.monotonic() - began)


def run(arguments: Sequence[object], n_ranks: int = 0, limit: float = 60.0, **options: object) -> Ended:
    """Run a job to its end."""
    return finish(start(arguments, n_ranks, **options), limit)  # type: ignore[arg-type]


@lru_cache
def soon() -> float:
    """Return the seconds within which a job ends that has no more to do; machines differ in what a start takes."""
    ended = run(["generate", "-p", "Once", "-n", "1"])
    assert ended.code == 0, ended.err
    return max(5.0, 6 * ended.seconds)


def ranks_of(job: subprocess.Popen[str], n_ranks: int, limit: float = 20.0) -> list[int]:
    """Return the process ids of a job's ranks in their order, once all are there."""
    began = time.monotonic()
    while time.monotonic() - began < limit:
        found = [pid for pid in _descendants(job.pid) if _is_rank(pid)]
        if len(found) == n_ranks:
            return sorted(found, key=_rank_of)
        time.sleep(0.05)
    pytest.fail(f"{n_ranks} ranks did not appear within {limit} s")


def _descendants(pid: int) -> list[int]:
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            words = children.read_text().split()
        except OSError:
            continue
        for word in words:
            found += [int(word), *_descendants(int(word))]
    return found


def _is_rank(pid: int) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"python" in words[0] and b"mpillama" in words


def _rank_of(pid: int) -> int:
    """Return the rank that a process is; their ids are in the same order until these begin anew at a small number."""
    with suppress(OSError):
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            name, _, value = word.partition(b"=")
            if name in (b"PMI_RANK", b"OMPI_COMM_WORLD_RANK"):
                return int(value)
    return 0
