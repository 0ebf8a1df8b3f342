"""Keep the ranks of a pytest session together: they agree on every outcome, or the job ends.

After each phase (setup, call, teardown) of each test all ranks exchange its outcome.

- A rank failed and the others got through: the test fails on every rank, and the session goes on, still in step.
- A rank failed and the others wait for it inside the test: it prints its report and aborts the job after a short grace.
- The ranks are not at the same test, or skip different ones: a failure as well.

Outside ``--with-mpi`` nothing here imports mpi4py, and the tests of this folder are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

if TYPE_CHECKING:
    from mpi4py import MPI

GRACE_S = 3.0  # how long a rank that failed waits for the others
RECORD_BYTES = 4096


class World:
    """All ranks, with an exchange that never blocks inside MPI and so can give up."""

    def __init__(self, config: pytest.Config) -> None:
        from mpi4py import MPI

        self.MPI = MPI
        self.config = config
        # A communicator of its own: a test that fails half-way may leave messages behind in COMM_WORLD.
        self.comm = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self.comm.rank, self.comm.size
        logs = os.environ.get("MPILLAMA_TEST_LOGS")
        self._state = Path(logs) / f"rank{self.rank}.state" if logs else None
        self._failure = ""

    def note(self, now: str, failure: str = "") -> None:
        """Leave a line for run_mpi.py, which reads it if the job fails: the first failure here, and what goes on."""
        self._failure = self._failure or (f"failed {failure}; " if failure else "")
        if self._state is not None:
            self._state.write_text(f"{self._failure}{now}\n")

    def wait(self, request: MPI.Request, patience_s: float | None) -> bool:
        """Wait for `request`, mostly asleep; False if it is not complete after `patience_s` (None: no end)."""
        start, pause_s = time.monotonic(), 1e-5
        while not request.Test():
            if patience_s is not None and time.monotonic() - start > patience_s:
                return False
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 2e-3)
        return True

    def exchange(self, record: dict[str, str], patience_s: float | None) -> list[dict[str, str]] | None:
        """Records of all ranks, or None if they have not all come within `patience_s`."""
        record = {key: text[-RECORD_BYTES // 16 :] for key, text in record.items()}  # JSON may escape 1 char to 6 bytes
        mine = json.dumps(record).encode().ljust(RECORD_BYTES)
        all_ = bytearray(RECORD_BYTES * self.size)
        request = self.comm.Iallgather([mine, self.MPI.BYTE], [all_, self.MPI.BYTE])
        if not self.wait(request, patience_s):
            return None
        return [json.loads(all_[i : i + RECORD_BYTES]) for i in range(0, len(all_), RECORD_BYTES)]

    def abort(self, message: str) -> NoReturn:
        """End the job, saying why."""
        self.note("aborted the job", message)
        writer = self.config.get_terminal_writer()  # stdout and stderr may be captured, and would be lost
        writer.line(f"\nrank {self.rank}: {message}; aborting the job")
        writer.flush()
        self.comm.Abort(1)
        raise SystemExit(1)


def crash_line(report: pytest.TestReport | pytest.CollectReport) -> str:
    """One line on why `report` did not pass, empty if it did."""
    if report.passed:
        return ""
    if isinstance(report.longrepr, tuple):  # a skip: path, line, reason
        return str(report.longrepr[2])
    crash = getattr(report.longrepr, "reprcrash", None)
    if crash is None:  # a collection error, whose last lines tell most
        return " | ".join(report.longreprtext.splitlines()[-3:])[-200:]
    return f"{Path(crash.path).name}:{crash.lineno}: " + " | ".join(crash.message.splitlines()[:3])[:200]


class KeepTogether:
    """Pytest plugin of one rank."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.world = World(config)
        self.exit_status = 0
        self.collect_error = ""
        self.world.note("started")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Remember the first error of the collection."""
        if report.failed:
            self.collect_error = self.collect_error or crash_line(report)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        """All ranks must have the same tests in the same order."""
        ids = "\n".join(item.nodeid for item in session.items)
        found = f"{len(session.items)} tests" + f" and an error: {self.collect_error}" * bool(self.collect_error)
        record = {"found": found, "hash": hashlib.sha256(ids.encode()).hexdigest()}
        records = self.world.exchange(record, None)
        assert records is not None
        if any(other["hash"] != records[0]["hash"] for other in records):
            found = "; ".join(f"rank {rank}: {other['found']}" for rank, other in enumerate(records))
            self.world.abort(f"the ranks collected different tests: {found}")

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Make the outcome of this phase the same on all ranks."""
        report = yield
        at = f"{item.nodeid} ({report.when})"
        mine = {"at": at, "outcome": report.outcome, "why": crash_line(report)}
        if report.failed:
            self.world.note("waited for the other ranks", f"{at}: {mine['why']}")
        records = self.world.exchange(mine, GRACE_S if report.failed else None)
        if records is None:
            writer = self.config.get_terminal_writer()
            writer.line()
            writer.sep("_", f"rank {self.world.rank}: {at}")
            report.toterminal(writer)
            for name, content in report.sections:
                writer.sep("-", name)
                writer.line(content.rstrip())
            writer.flush()
            self.world.abort(f"{at}: {mine['why']} (the other ranks wait inside a test)")
        if any(other["at"] != at[-len(other["at"]) :] for other in records):
            self.world.abort("the ranks are at different tests: " + ", ".join(other["at"] for other in records))
        if report.failed or all(other["outcome"] == report.outcome for other in records):
            return report
        report.outcome = "failed"
        report.__dict__.pop("wasxfail", None)
        report.longrepr = "\n".join(
            f"rank {rank}: {other['outcome']} {other['why']}".rstrip() for rank, other in enumerate(records)
        )
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Say where this rank is."""
        self.world.note(f"was in {nodeid}")

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        """Keep the status for the end."""
        self.exit_status = int(exitstatus)
        self.world.note("ended its session")

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """Leave together: a rank that leaves early with an error would leave the others waiting for ever."""
        if not self.world.wait(self.world.comm.Ibarrier(), GRACE_S if self.exit_status else None):
            self.world.abort(f"session ended with exit status {self.exit_status}, the other ranks still run")


def pytest_configure(config: pytest.Config) -> None:
    """Register the plugin when running under MPI."""
    if config.getoption("--with-mpi"):
        config.pluginmanager.register(KeepTogether(config), "mpi-keep-together")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder needs MPI."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.mpi)


@pytest.fixture
def comm() -> Iterator[Any]:
    """All ranks, in a communicator of this test alone (``mpi4py.MPI.Comm``)."""
    from mpi4py import MPI

    mine = MPI.COMM_WORLD.Dup()
    yield mine
    mine.Free()
