"""Run pytest on N ranks, so that a failing, dying or hanging rank ends the job and is named.

    python tests/run_mpi.py -n 3 --limit 300 -- tests/mpi -k allreduce

Rank 0 writes to the terminal. What the other ranks write goes to files, which are shown when something went wrong. The
exit code is 0 only if every rank of the world that was asked for ran its session to the end and passed.
tests/mpi/conftest.py does the part that happens inside the ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

TAIL_LINES = 200
GRACE_S = 5.0
LIMIT_EXIT_CODE = 124  # that of timeout(1)
ENDED_BY_ITSELF = (
    0,
    1,
    2,
    5,
)  # pytest: passed, failed, interrupted, nothing collected; tests/mpi/conftest.py handles these


def find_mpirun() -> str:
    """The launcher of the environment that runs this script, which is the one whose MPI library mpi4py loads."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun") or shutil.which("mpiexec")
    if found is None:
        sys.exit("run_mpi: there is no mpirun here; `pip install mpich` provides one, or give --mpirun PATH")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Command line of the runner; pytest's own arguments follow ``--``."""
    parser = argparse.ArgumentParser(description="Run pytest on N ranks.")
    parser.add_argument("-n", type=int, required=True, metavar="N", help="number of ranks")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="wall-clock limit, seconds")
    parser.add_argument("--mpirun", default=None, metavar="PATH", help="launcher (default: the one beside python)")
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="of the ranks (default: ours)")
    parser.add_argument("--in-rank", nargs=2, default=None, metavar=("LOGS", "DEADLINE"), help=argparse.SUPPRESS)
    parser.add_argument("args", nargs="*", metavar="-- ARG", help="arguments of pytest")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------ inside a rank


def rank_main(n: int, logs: Path, deadline: float, args: Sequence[str]) -> None:
    """Run pytest as one rank of n; write its exit status to ``logs/rank<r>.exit``. Deadline: as time.time()."""
    from mpi4py import MPI

    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    if size != n:
        sys.exit(f"run_mpi: asked for {n} ranks but the world has {size}: mpirun and mpi4py's MPI library do not match")

    if rank:
        log = os.open(logs / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
    stacks = (logs / f"rank{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.dump_traceback_later(max(deadline - time.time(), 0.1), file=stacks)

    import pytest

    status = int(
        pytest.main(
            [
                "--with-mpi",
                f"--basetemp={logs}/tmp{rank}",
                "--timeout-method=thread",  # a signal is not seen inside an MPI call
                *("-p", "no:faulthandler"),  # pytest's would cancel the dump asked for above
                *("-p", "no:cacheprovider"),  # all ranks would write the same cache
                *args,
            ]
        )
    )
    sys.stdout.flush()
    (logs / f"rank{rank}.exit").write_text(str(status))
    if status not in ENDED_BY_ITSELF:
        time.sleep(GRACE_S)  # for ranks with the same trouble to say so too
        MPI.COMM_WORLD.Abort(status)
    # The status travels in the file: a non-zero exit code would make mpirun add its own report of a crash.


# ------------------------------------------------------------------------------------------------ around the job


def pids_naming(text: str) -> Iterator[int]:
    """Processes with `text` in their command line (none where there is no /proc)."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if text.encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                yield int(entry.parent.name)


def kill(job: subprocess.Popen[bytes], logs: Path) -> None:
    """End the launcher, and whatever it left behind: launchers put their ranks into process groups of their own."""
    for sig, patience_s in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 2.0)):
        if job.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(job.pid, sig)
            with contextlib.suppress(subprocess.TimeoutExpired):
                job.wait(patience_s)
    for pid in pids_naming(str(logs)):  # the folder has a random name, so these are processes of this job
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def read(path: Path) -> str:
    """Text of a file that may not exist."""
    return path.read_text(errors="replace") if path.exists() else ""


def report(n: int, logs: Path, why: str) -> None:
    """Show the output of the ranks that failed (of all ranks but 0 if none says so), then one line a rank."""
    states = [read(logs / f"rank{rank}.state").strip() or "never started a session" for rank in range(n)]
    failed = [rank for rank in range(n) if states[rank].startswith("failed")]
    for rank in failed or range(n):
        lines = read(logs / f"rank{rank}.log").splitlines()
        if lines:
            print(f"\n----- output of rank {rank} (last {TAIL_LINES} lines) -----", *lines[-TAIL_LINES:], sep="\n")
    for rank in range(n):
        if stacks := read(logs / f"rank{rank}.stacks").strip():
            print(f"\n----- stacks of rank {rank} -----", stacks, sep="\n")
    print(f"\nrun_mpi: FAILED on {n} ranks: {why}")
    for rank, state in enumerate(states):
        print(f"  rank {rank}: {state}")
    sys.stdout.flush()


def run(n: int, limit_s: float, mpirun: str, python: str, args: Sequence[str]) -> int:
    """Run the job; return the exit code: 0, pytest's, the launcher's, or 124 if it ran into the limit."""
    environ = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"} | os.environ  # ranks share the cores
    # All ranks draw the same random inputs, and a failure can be repeated.
    environ.setdefault("MPILLAMA_TEST_SEED", str(secrets.randbelow(2**32)))
    if not sys.stdout.isatty():
        environ.setdefault("PY_COLORS", "0")  # Open MPI gives its ranks a terminal

    with tempfile.TemporaryDirectory(prefix="mpillama-tests-", ignore_cleanup_errors=True) as folder:
        logs = Path(folder)
        environ["MPILLAMA_TEST_LOGS"] = folder
        me = [python, __file__, "-n", str(n), "--in-rank", folder, str(time.time() + limit_s), "--", *args]
        # A session of its own: signals for the job stay in the job. No stdin: mpirun would read the terminal's.
        job = subprocess.Popen(
            [mpirun, "-n", str(n), *me], env=environ, stdin=subprocess.DEVNULL, start_new_session=True
        )
        try:
            code = job.wait(limit_s + 1.0)  # the ranks write their stacks at the limit
            why = f"mpirun ended with exit code {code}"
        except subprocess.TimeoutExpired:
            code, why = LIMIT_EXIT_CODE, f"not done after {limit_s:g} s; killed"
        finally:
            kill(job, logs)

        statuses = [read(logs / f"rank{rank}.exit") for rank in range(n)]
        if code == 0 and "" in statuses:
            code, why = 1, "a rank ended without finishing its session"
        elif code == 0 and set(statuses) != {"0"}:
            code = max(int(status) for status in statuses)
            why = f"pytest ended with exit code {code}"
        if code != 0:
            report(n, logs, f"{why} (MPILLAMA_TEST_SEED={environ['MPILLAMA_TEST_SEED']})")
        return code if code >= 0 else 128 - code


def stop(signum: int, frame: FrameType | None) -> NoReturn:
    """Leave through the `finally` that kills the job: it does not hear signals sent to this process or its group."""
    sys.exit(128 + signum)


def main() -> None:
    """Entry point of the runner, and of each rank it starts."""
    options = parse(sys.argv[1:])
    if options.in_rank is not None:
        logs, deadline = options.in_rank
        rank_main(options.n, Path(logs), float(deadline), options.args)
    else:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
                signal.signal(signum, stop)
        sys.exit(run(options.n, options.limit, options.mpirun or find_mpirun(), options.python, options.args))


if __name__ == "__main__":
    main()
