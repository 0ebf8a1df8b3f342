"""The file of results: whole lines only, on disk before they count, and taken up again after any kind of death."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from mpillama.batch.ids import IdSet
from mpillama.errors import UsageError, UserError

_CHUNK = 4 << 20


class Results:
    """Appends result lines to a file; as a context it closes the file, with everything on disk.

    Args:
        path: of the file; one that exists is continued, and a last line that was torn is removed.
        sync_seconds: at most so much time of work is lost if the host itself dies.

    Attributes:
        answered: `key` of every line in the file.
        repaired: bytes of a torn last line that were removed.

    Raises:
        UsageError: the file cannot be written, another job is writing it, or it holds something else than results.
    """

    def __init__(self, path: Path, sync_seconds: float = 2.0) -> None:
        self._path, self._sync_seconds = path, sync_seconds
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(f"-o {path}: {error.strerror}") from None
        try:
            self._lock()
            self.answered = IdSet()
            self.repaired = 0
            self._size = self._scan()
        except BaseException:
            os.close(self._fd)
            raise
        self._synced = time.monotonic()
        self._dirty = False

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"-o {self._path}: another job is writing this file; wait for it, or end it") from None
        except OSError:
            # Some cluster file systems have no locks; then it is up to the user to start one job at a time.
            return

    def _scan(self) -> int:
        """Read what is there; returns the size of the whole lines, to which the file is cut."""
        size, n_lines, rest = 0, 0, b""
        try:
            if os.fstat(self._fd).st_size and not os.path.isfile(self._path):
                raise UsageError(f"-o {self._path}: not an ordinary file, so results could not be kept apart")
            while chunk := os.pread(self._fd, _CHUNK, size + len(rest)):
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    n_lines += 1
                    self.answered.add(self._key_of(line, n_lines))
                    size += len(line) + 1
            if rest:
                self.repaired = len(rest)
                os.ftruncate(self._fd, size)
            os.lseek(self._fd, size, os.SEEK_SET)
        except OSError as error:
            raise UsageError(f"-o {self._path}: {error.strerror}") from None
        return size

    def _key_of(self, line: bytes, number: int) -> str:
        try:
            result = json.loads(line)
            return key(result["custom_id"], result["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UsageError(
                f"-o {self._path}: line {number} is not a result of mpillama batch; name another file, or move it away"
            ) from None

    def write(self, result: dict[str, Any]) -> None:
        """Append a line.

        Raises:
            UserError: the disk is full or fails; the file ends with the last whole line.
        """
        line = json.dumps(result, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "backslashreplace") + b"\n"
        view = memoryview(line)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)
            raise UserError(
                f"-o {self._path}: {error.strerror}; the {len(self.answered)} results before are safe: make room and "
                "run the same command again"
            ) from None
        self._size += len(line)
        self._dirty = True
        self.answered.add(key(result["custom_id"], result["id"]))
        if time.monotonic() - self._synced > self._sync_seconds:
            self.sync()

    def sync(self) -> None:
        """Wait until everything is on disk.

        Raises:
            UserError: the disk says it is not.
        """
        if self._dirty:
            try:
                os.fsync(self._fd)
            except OSError as error:
                raise UserError(
                    f"-o {self._path}: {error.strerror}; the last results may be lost: run the same command again"
                ) from None
        self._dirty = False
        self._synced = time.monotonic()

    def __enter__(self) -> Results:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.sync()
        finally:
            os.close(self._fd)


def key(custom_id: Any, result_id: str) -> str:
    """Return what tells requests apart: the custom_id, or for a line that has none the number of the line."""
    return f"c{custom_id}" if isinstance(custom_id, str) else f"r{result_id}"
