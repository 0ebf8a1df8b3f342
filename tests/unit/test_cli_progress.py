"""What a person sees on stderr."""

from __future__ import annotations

import io
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillama.cli.progress import JointProgress, LoadProgress, Log, format_bytes, format_timings
from mpillama.comm.threads import ThreadWorld, run_threads
from mpillama.errors import UsageError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def arguments(**changes: Any) -> Namespace:
    defaults = {"verbose": False, "log_file": None, "log_disable": False, "no_progress": False, "notes": []}
    return Namespace(**defaults | changes)


def test_progress_counts_bytes_on_a_terminal(rng: np.random.Generator) -> None:
    sizes = [int(n) for n in rng.integers(1, 2**20, 20)]
    terminal = Terminal()
    bar = LoadProgress(sum(sizes), stream=terminal)
    for n in sizes:
        bar.update(n)
    assert bar._bar.n == sum(sizes)
    bar.close()
    bar.close()
    assert "loading" in terminal.getvalue()


def test_no_progress_without_a_terminal_or_when_not_wanted() -> None:
    for stream, enabled in ((io.StringIO(), True), (Terminal(), False)):
        with LoadProgress(10, enabled, stream) as bar:
            bar.update(10)
        assert stream.getvalue() == ""


def test_log_lines_on_a_terminal() -> None:
    stream = Terminal()
    log = Log(arguments(notes=["-ngl has no effect"]), stream=stream)
    log.info("one\ntwo")
    log.verbose("three")
    assert stream.getvalue() == "one\ntwo\n"


@pytest.mark.parametrize(("stream", "no_progress"), [(io.StringIO(), False), (Terminal(), True)])
def test_quiet_without_a_terminal_or_when_told(stream: io.StringIO, no_progress: bool) -> None:
    log = Log(arguments(no_progress=no_progress), stream=stream)
    log.info("one")
    assert stream.getvalue() == ""
    assert not log.interactive
    Log(arguments(no_progress=no_progress, verbose=True), stream=stream).info("two")
    assert stream.getvalue() == "two\n"


def test_progress_of_all_ranks() -> None:
    """Rank 0's bar ends with what all have loaded; the others send few messages, whatever the size of their reads."""
    shares = [1000, 5000, 0]

    def main(world: ThreadWorld) -> tuple[int, int]:
        sent: list[int] = []
        report = world.report
        world.report = lambda n: (sent.append(n), report(n))[1]  # type: ignore[method-assign]
        with JointProgress(world, shares, enabled=False) as bar:
            counts: list[int] = []
            bar._bar.update = counts.append  # type: ignore[method-assign]
            for _ in range(shares[world.rank]):
                bar.update(1)
        return sum(counts), len(sent)

    results = run_threads(3, main)
    assert results[0][0] == 6000
    assert [n for _, n in results] == [0, 100, 0]


def test_verbose_log_shows_notes() -> None:
    stream = io.StringIO()
    Log(arguments(verbose=True, notes=["-ngl has no effect"]), stream=stream).verbose("three")
    assert stream.getvalue() == "-ngl has no effect\nthree\n"


def test_log_file_gets_every_line_with_a_time(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_text("old")
    log = Log(arguments(log_file=path, notes=["note"]), stream=io.StringIO())
    log.info("one\ntwo")
    log.verbose("three ü")
    lines = path.read_text(encoding="utf-8").splitlines()
    log.close()
    log.close()
    assert [line.split(" ", 1)[1] for line in lines] == ["note", "one", "two", "three ü"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d .*", line) for line in lines)


@pytest.mark.parametrize(("rank", "disabled"), [(1, False), (0, True)])
def test_silence_on_other_ranks_and_when_disabled(tmp_path: Path, rank: int, disabled: bool) -> None:
    path, stream = tmp_path / "x.log", Terminal()
    log = Log(arguments(verbose=True, log_file=path, log_disable=disabled, notes=["note"]), rank, stream)
    log.info("one")
    log.verbose("two")
    assert stream.getvalue() == ""
    assert not path.exists()
    assert not log.interactive


def test_interactive_on_a_terminal() -> None:
    assert Log(arguments(), stream=Terminal()).interactive


def test_log_file_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--log-file .*: No such file or directory"):
        Log(arguments(log_file=tmp_path / "none" / "x.log"))


def test_timings() -> None:
    assert format_timings(load=1.5, sample=(0.01, 21), prompt=(0.5, 10), eval=(4.0, 20)).split("\n") == [
        "   sampling time =      10.00 ms /    21 tokens (    0.48 ms per token,  2100.00 tokens per second)",
        "       load time =    1500.00 ms",
        "prompt eval time =     500.00 ms /    10 tokens (   50.00 ms per token,    20.00 tokens per second)",
        "       eval time =    4000.00 ms /    20 runs   (  200.00 ms per token,     5.00 tokens per second)",
        "      total time =    6010.00 ms /    30 tokens",
    ]


def test_timings_of_nothing_divide_by_nothing() -> None:
    text = format_timings(load=2.0, sample=(0.0, 0), prompt=(0.1, 1), eval=(0.0, 0), read=(2.0, 3 << 30))
    assert "       load time =    2000.00 ms (weights: 3.00 GiB in 2.00 s, 1.50 GiB/s)\n" in text
    text = format_timings(load=0.0, sample=(0.0, 0), prompt=(0.1, 1), eval=(0.0, 0))
    assert "       eval time =       0.00 ms /     0 runs\n" in text
    assert "nan" not in text
    assert "inf" not in text


@pytest.mark.parametrize(
    ("n", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 * 2**19, "1.50 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5.00 TiB"),
        (2**62, "4096.00 PiB"),
    ],
)
def test_format_bytes(n: int, text: str) -> None:
    assert format_bytes(n) == text
