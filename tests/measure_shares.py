"""How much ``-ts auto`` gains where one rank has half of a core: ``python tests/measure_shares.py`` (Linux).

Runs ``mpillama bench`` with equal shares and with ``-ts auto`` in alternation, and prints the ratio of their speeds for
each test: the median over the rounds, and the rounds. The last rank is slowed down by a control group (version 1 or 2,
needs root), or where there is none by a busy neighbour on its core. Other load on the machine falsifies the figures;
``--core 0.2`` lets all ranks together take so little that they get it on a busy machine too. With that, all ranks that
are not slow share one group: it is meant for two ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median

CGROUPS = Path("/sys/fs/cgroup")
# Microseconds: short periods look like a slow core and not like one that stops now and then; the kernel's least quota.
PERIOD, LEAST = 10_000, 1_000
_FAST, _SLOW, _PINS = "MEASURE_SHARES_FAST", "MEASURE_SHARES_SLOW", "MEASURE_SHARES_CORE"


def make_group(name: str, share: float) -> Path:
    """Make a control group whose processes together get a share of a core; returns its folder."""
    period = max(PERIOD, round(LEAST / share))
    quota = round(share * period)
    if (CGROUPS / "cpu").is_dir():
        folder = CGROUPS / "cpu" / name
        folder.mkdir()
        (folder / "cpu.cfs_period_us").write_text(str(period))
        (folder / "cpu.cfs_quota_us").write_text(str(quota))
    else:
        folder = CGROUPS / name
        (CGROUPS / "cgroup.subtree_control").write_text("+cpu")
        folder.mkdir()
        (folder / "cpu.max").write_text(f"{quota} {period}")
    return folder


@contextmanager
def slow_core(core: float) -> Iterator[dict[str, str]]:
    """Make what slows the last rank down; yields the variables that tell `rank` how."""
    made: list[Path] = []
    try:
        for name, share in (("slow", core / 2), *([("fast", core)] if core < 1 else [])):
            made.append(make_group(f"mpillama-{name}-{os.getpid()}", share))
    except OSError as error:
        if core < 1:
            sys.exit(f"--core needs control groups: {error}")
        last = max(os.sched_getaffinity(0))
        print(f"no control group ({error}): a busy neighbour on core {last}", file=sys.stderr)
        busy = [sys.executable, "-c", f"import os; os.sched_setaffinity(0, [{last}])\nwhile True: pass"]
        with subprocess.Popen(busy) as neighbour:
            try:
                yield {_PINS: str(last)}
            finally:
                neighbour.kill()
        return
    try:
        yield dict(zip((_SLOW, _FAST), (str(folder / "cgroup.procs") for folder in made), strict=False))
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def rank(command: list[str]) -> None:
    """Become a rank of the bench."""
    for at, of in (("PMI_RANK", "PMI_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        if at in os.environ:
            last = int(os.environ[at]) == int(os.environ[of]) - 1
            break
    else:
        sys.exit("neither MPICH's nor Open MPI's mpirun has started this")
    group = os.environ.get(_SLOW if last else _FAST)
    if group:
        Path(group).write_text(str(os.getpid()))
    if _PINS in os.environ:
        core = int(os.environ[_PINS])
        os.sched_setaffinity(0, {core} if last else os.sched_getaffinity(0) - {core})
    os.execv(sys.executable, [sys.executable, "-m", "mpillama", *command])


def main() -> None:
    """Measure, and print a line for each test."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-1b:Q4_0", help="of the model (default: %(default)s)")
    parser.add_argument("-p", default="256", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("-n", default="32", help="tokens to generate (default: %(default)s)")
    parser.add_argument("-r", default="3", help="repetitions of each test in a round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both splits (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="on as many cores (default: %(default)s)")
    parser.add_argument(
        "--core",
        type=float,
        default=1.0,
        help="what the other ranks may take of a core each; less on a busy machine, so that all get what they may take",
    )
    args = parser.parse_args()
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or sys.exit("there is no mpirun")
    even = "/".join(["1"] * args.ranks)
    splits = ",".join([f"{even},auto"] * args.rounds)
    bench = ["bench", "--shape", args.shape, "-p", args.p, "-n", args.n, "-r", args.r, "-t", "1", "-ts", splits]
    with slow_core(args.core) as env:
        command = [mpirun, "-n", str(args.ranks), sys.executable, __file__, "--rank", *bench, "-o", "jsonl"]
        told = subprocess.run(command, env={**os.environ, **env}, stdout=subprocess.PIPE, text=True, check=True).stdout
    rows = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    print(f"{args.shape}, {args.ranks} ranks with 1 thread each, the last one at half speed")
    for test in dict.fromkeys(row["test"] for row in rows):
        found = [row for row in rows if row["test"] == test]
        pairs = list(zip(found[::2], found[1::2], strict=True))
        ratios = [found["avg_ts"] / equal["avg_ts"] for equal, found in pairs]
        rounds = ", ".join(
            f"{found['tensor_split']}: {found['avg_ts']:.4g} / {equal['avg_ts']:.4g} t/s" for equal, found in pairs
        )
        print(f"{test}: -ts auto is {median(ratios):.2f} times as fast as equal shares ({rounds})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank(sys.argv[2:])
    else:
        main()
