"""What a person sees on stderr: the progress of loading, log lines, timings."""

from __future__ import annotations

import os
import stat
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from mpillama.comm.base import World
from mpillama.errors import UsageError

_LAUNCHERS = ("mpiexec", "mpirun", "prterun", "orterun", "srun")


def is_watched(stream: TextIO) -> bool:
    """Whether what is written to ``stream`` reaches a terminal, directly or through a launcher on this host.

    A launcher connects its ranks by pipes and copies what they write to its own stderr, so it is that which counts.
    """
    if stream.isatty():
        return True
    try:
        if not stat.S_ISFIFO(os.fstat(stream.fileno()).st_mode):
            return False
        pid = os.getppid()
        while pid > 1:
            process = Path("/proc", str(pid))
            if process.joinpath("comm").read_text().startswith(_LAUNCHERS):
                return os.readlink(process / "fd" / "2").startswith(("/dev/pts/", "/dev/tty"))
            pid = int(process.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        # No /proc, another user's process, a stream without a file: then nobody is known to watch.
        return False
    return False


class LoadProgress:
    """A bar of the bytes loaded by all ranks; nothing at all without a terminal or when not enabled."""

    def __init__(self, total_bytes: int, enabled: bool = True, stream: TextIO | None = None) -> None:
        stream = sys.stderr if stream is None else stream
        self._bar = tqdm(
            total=total_bytes,
            desc="loading",
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            file=stream,
            disable=not (enabled and is_watched(stream)),
            leave=False,
            dynamic_ncols=True,
        )

    def update(self, n: int) -> None:
        """Count ``n`` more bytes."""
        self._bar.update(n)

    def close(self) -> None:
        """Remove the bar; may be called more than once."""
        self._bar.close()

    def __enter__(self) -> LoadProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class JointProgress:
    """The bytes that all ranks load, on rank 0's bar; as a context it ends when all ranks have loaded their shares.

    The others report every hundredth of their share, which keeps messages few however many tensors there are.
    """

    def __init__(self, world: World, shares: Sequence[int], enabled: bool) -> None:
        self._world, self._share, self._left = world, shares[world.rank], shares[world.rank]
        self._others = sum(shares) - shares[0]
        self._pending = 0
        self._bar = LoadProgress(sum(shares), enabled)

    def update(self, n: int) -> None:
        """Count ``n`` more bytes of this rank."""
        self._left -= n
        if self._world.rank == 0:
            self._bar.update(n)
            self._collect()
            return
        self._pending += n
        if self._pending * 100 >= self._share:
            self._flush()

    def give_up(self) -> None:
        """Count what this rank will not load, so that nobody waits for it."""
        self.update(self._left)

    def _flush(self) -> None:
        if self._pending:
            self._world.report(self._pending)
            self._pending = 0

    def _collect(self) -> None:
        n = self._world.reported()
        self._others -= n
        self._bar.update(n)

    def __enter__(self) -> JointProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._flush()
        # Where this rank has failed, the others are about to be told; there is nothing to wait for.
        while kind is None and self._world.rank == 0 and self._others > 0:
            time.sleep(0.01)
            self._collect()
        self._bar.close()


class Log:
    """Lines for a person, from rank 0: to stderr, and with time stamps to the file of ``--log-file``.

    Without a terminal, or with ``--no-progress``, stderr stays quiet unless ``-v`` is given; the file gets everything.
    Reads ``verbose``, ``no_progress``, ``log_file``, ``log_disable`` and ``notes`` of the namespace. On other ranks and
    with ``--log-disable`` nothing is written and no file is made. Raises UsageError if the file cannot be written.
    """

    def __init__(self, args: Namespace, rank: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._active = rank == 0 and not args.log_disable
        self._verbose = args.verbose
        self._interactive = is_watched(self._stream) and not args.no_progress
        self._file: TextIO | None = None
        if self._active and args.log_file is not None:
            try:
                self._file = args.log_file.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise UsageError(f"--log-file {args.log_file}: {error.strerror or error}") from error
        for note in args.notes:
            self.verbose(note)

    @property
    def interactive(self) -> bool:
        """Whether someone watches: lines are written, and to a terminal."""
        return self._active and self._interactive

    def info(self, text: str) -> None:
        """Write one or more lines for whoever watches."""
        self._write(text, shown=self._interactive or self._verbose)

    def verbose(self, text: str) -> None:
        """Write lines that reach stderr only with ``-v``; the file gets them always."""
        self._write(text, shown=self._verbose)

    def report(self, text: str) -> None:
        """Write lines that a job's own log should hold, whether or not someone watches."""
        self._write(text, shown=True)

    def _write(self, text: str, shown: bool) -> None:
        if not self._active:
            return
        if shown:
            print(text, file=self._stream, flush=True)
        if self._file is not None:
            stamp = datetime.now().astimezone().isoformat(timespec="milliseconds")
            for line in text.split("\n"):
                print(stamp, line, file=self._file)

    def close(self) -> None:
        """Close the file; may be called more than once."""
        if self._file is not None:
            self._file.close()
            self._file = None


def format_timings(
    *,
    load: float,
    sample: tuple[float, int],
    prompt: tuple[float, int],
    eval: tuple[float, int],
    read: tuple[float, int] = (0.0, 0),
) -> str:
    """Return timings as lines in llama.cpp's terms and layout.

    ``load`` is in seconds, the others are (seconds, tokens): drawn from the logits, evaluated together as the prompt,
    evaluated one by one ("runs"). The total is the sum of all four. ``read`` are seconds and bytes of the weights.
    """
    total = load + sample[0] + prompt[0] + eval[0]
    return "\n".join(
        (
            f"   sampling time = {_time(sample, 'tokens')}",
            f"       load time = {1e3 * load:10.2f} ms" + (f" (weights: {format_rate(*read)})" if read[1] else ""),
            f"prompt eval time = {_time(prompt, 'tokens')}",
            f"       eval time = {_time(eval, 'runs  ')}",
            f"      total time = {1e3 * total:10.2f} ms / {prompt[1] + eval[1]:5d} tokens",
        )
    )


def _time(measured: tuple[float, int], unit: str) -> str:
    seconds, n = measured
    time = f"{1e3 * seconds:10.2f} ms / {n:5d} {unit}"
    if n == 0 or seconds <= 0:
        return time.rstrip()
    return f"{time} ({1e3 * seconds / n:8.2f} ms per token, {n / seconds:8.2f} tokens per second)"


def format_rate(seconds: float, n_bytes: int) -> str:
    """Return bytes, the time they took, and their rate: ``3.00 GiB in 2.00 s, 1.50 GiB/s``."""
    rate = f", {n_bytes / seconds / 2**30:.2f} GiB/s" if seconds > 0 else ""
    return f"{format_bytes(n_bytes)} in {seconds:.2f} s{rate}"


def format_bytes(n: float) -> str:
    """Return a number of bytes in the largest binary unit that leaves at least 1: ``512 B``, ``1.50 MiB``."""
    units = ("KiB", "MiB", "GiB", "TiB", "PiB")
    if abs(n) < 1024:
        return f"{n:.0f} B"
    for unit in units:
        n /= 1024
        if abs(n) < 1024 or unit == units[-1]:
            break
    return f"{n:.2f} {unit}"
