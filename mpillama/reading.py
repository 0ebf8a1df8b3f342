"""Reads of a model's files, and a word about those that take too long.

Reads are plain ``pread`` calls into the arrays that are kept: on a parallel file system page faults through a memory
map are slower by orders of magnitude, and a copy would double a rank's memory.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np

from mpillama.errors import GGUFError

# Large enough for a parallel file system's stripes, small enough for a moving progress bar.
READ_BYTES = 16 << 20
PATIENCE = 10.0
"""Seconds that a single read may take before it is spoken of."""
# A file system that stays stuck is named again, at growing intervals of at most this many seconds.
_LONGEST_SILENCE = 300.0


class Silence:
    """No watch over reads."""

    def begin(self, path: str, offset: int, n_bytes: int) -> None:
        """Let a read begin."""

    def end(self) -> None:
        """Let it end."""


class ReadWatch(Silence):
    """Says while it lasts that a read does not come back: of a file server that is down, nothing else tells.

    Args:
        say: takes a line of text; called from a thread of its own.
        patience: seconds that a read may take.
    """

    def __init__(self, say: Callable[[str], None], patience: float | None = None) -> None:
        self._say, self._patience = say, PATIENCE if patience is None else patience
        self._now: tuple[str, int, int, float] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="read-watch", daemon=True)
        self._thread.start()

    def begin(self, path: str, offset: int, n_bytes: int) -> None:
        """Note that a read begins."""
        self._now = path, offset, n_bytes, time.monotonic()

    def end(self) -> None:
        """Note that it has come back."""
        self._now = None

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        told: tuple[str, int, int, float] | None = None
        wait = self._patience
        while not self._ended.wait(min(self._patience / 4, 1.0)):
            read, now = self._now, time.monotonic()
            if told is not None and read is not told:
                self._say(f"{told[0]} can be read again, after {now - told[3]:.0f} s")
                told, wait = None, self._patience
            if read is None or now - read[3] < wait:
                continue
            path, offset, n_bytes, since = read
            self._say(
                f"has been waiting for {now - since:.0f} s to read {n_bytes} bytes of {path} at offset {offset}: the "
                "file system is slow or does not answer"
            )
            told, wait = read, now - since + min(wait, _LONGEST_SILENCE)


class Files:
    """The files of a model, opened when they are needed; counts the bytes that are read.

    Args:
        paths: of the files.
        watch: over the reads; None: nobody looks.
    """

    def __init__(self, paths: Iterable[str], watch: ReadWatch | None = None) -> None:
        self._paths, self._watch = tuple(paths), watch or Silence()
        self._open: dict[int, int] = {}
        self.bytes_read = 0

    def close(self) -> None:
        """Close them."""
        for fd in self._open.values():
            os.close(fd)
        self._open.clear()

    def fill(
        self, part: int, offset: int, out: np.ndarray, what: str, progress: Callable[[int], None] = lambda n: None
    ) -> None:
        """Read so many bytes of a file as ``out`` takes, flat uint8; there may be millions of calls.

        Args:
            part: number of the file.
            offset: of the first byte.
            out: is filled.
            what: is read, for the error.
            progress: called with each number of bytes.

        Raises:
            GGUFError: the file cannot be read, or has become shorter.
        """
        path, view, done, total = self._paths[part], out.data, 0, len(out)
        try:
            fd = self._open.get(part)
            if fd is None:
                self._watch.begin(path, 0, 0)
                fd = self._open[part] = os.open(path, os.O_RDONLY)
            while done < total:
                piece = view[done : done + READ_BYTES] if total > READ_BYTES or done else view
                self._watch.begin(path, offset + done, len(piece))
                n = os.preadv(fd, [piece], offset + done)
                if n == 0:
                    raise GGUFError(f"{path}: the file ends inside {what}; copy it again")
                done += n
                self.bytes_read += n
                progress(n)
        except OSError as error:
            raise GGUFError(f"{path}: cannot read {what}: {error.strerror}") from error
        finally:
            self._watch.end()
