"""Links that fail and ranks that stop or die, one on each of two hosts: the job goes on, or names the culprit."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest
from machines import MPILLAMA, ROOT, Hosts, Job, clean_environment, is_open_mpi, until

LIMIT = 4
# Beyond the limit: what ranks wait for each other's words, and for the launcher to end all.
SLACK = 12.0
RANK = f"{MPILLAMA} generate"
TELL = [*MPILLAMA.split(), "generate", "-p", "Once upon a time", "--temp", "0", "-t", "1", "--ignore-eos", "-c", "8192"]


@pytest.fixture
def telling(hosts: Hosts) -> Iterator[Job]:
    """A story that does not end, by a rank on each host, of which the beginning is told."""
    launch = [ROOT / "launch" / "hostfile.sh", hosts.file, 1]
    with hosts.started("hA", [*launch, *TELL, "--timeout", LIMIT]) as job:
        wait_for_text(job)
        yield job


def wait_for_text(job: Job) -> None:
    """Wait until a job has begun to tell."""
    until("the beginning of the story", lambda: job.out.stat().st_size > 40 or job.process.poll() is not None)
    assert job.process.poll() is None, job.err.read_text()


def assert_ended(hosts: Hosts, job: Job, *words: str, launcher_too: bool = True) -> None:
    """Wait for the end of a job that says why in one line, and leaves nothing behind."""
    began = time.monotonic()
    left = lambda: [*hosts.processes("hA", RANK), *hosts.processes("hB", RANK)]  # noqa: E731
    until("the end of all ranks", lambda: not left(), LIMIT + SLACK)
    if launcher_too:
        assert job.process.wait(max(1.0, LIMIT + SLACK - (time.monotonic() - began))) != 0
    told = job.err.read_text()
    ours = [line for line in told.splitlines() if "mpillama: error:" in line]
    for word in words:
        assert any(word in line for line in ours), told
    assert "Traceback" not in told


def test_a_link_that_is_down_for_a_while_only_delays(hosts: Hosts) -> None:
    """TCP repeats what was lost, up to as long again after the link is back."""
    arguments = [*TELL, "-n", "150", "--deterministic"]
    alone = subprocess.run(arguments, capture_output=True, text=True, cwd=ROOT, env=clean_environment())
    launch = [ROOT / "launch" / "hostfile.sh", hosts.file, 1]
    with hosts.started("hA", [*launch, *arguments, "--timeout", "30"]) as job:
        wait_for_text(job)
        hosts.link("down")
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                job.process.wait(6)
        finally:
            hosts.link("up")
        assert job.process.wait(30) == 0, job.err.read_text()
    assert job.out.read_text() == alone.stdout
    assert len(alone.stdout.split()) > 80


def test_a_link_that_stays_down_ends_the_job(hosts: Hosts, telling: Job) -> None:
    try:
        hosts.link("down")
        # Open MPI's launcher goes on waiting for its daemon on the other host.
        assert_ended(hosts, telling, " on hB", launcher_too=not is_open_mpi())
    finally:
        hosts.link("up")


def test_a_rank_that_stops_is_named(hosts: Hosts, telling: Job) -> None:
    (victim,) = hosts.processes("hB", RANK)
    os.kill(victim, signal.SIGSTOP)
    assert_ended(hosts, telling, "rank 1 on hB")


def test_a_rank_that_is_killed_ends_the_job(hosts: Hosts, telling: Job) -> None:
    (victim,) = hosts.processes("hB", RANK)
    os.kill(victim, signal.SIGKILL)
    assert_ended(hosts, telling)
    # The launcher says which one it was; Open MPI's only if it hears of that before the library ends the other rank.
    told = telling.out.read_text() + telling.err.read_text()
    assert "hB" in told or (is_open_mpi() and "Socket closed" in told), told
