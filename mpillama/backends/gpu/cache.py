"""Compiled kernels, kept for the user on this node: home folders are shared by nodes and slow, and /tmp is neither."""

from __future__ import annotations

import fcntl
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mpillama.errors import UserError


def user_cache() -> Path:
    """Return the user's folder for compiled kernels, below the node's folder for temporary files (``TMPDIR``).

    Raises:
        UserError: somebody else could have put files there.
    """
    path = Path(tempfile.gettempdir()) / f"mpillama-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise UserError(
            f"{path} is not a folder that only you can write to; remove it, or set TMPDIR to another folder"
        )
    return path


@contextmanager
def alone(folder: Path, key: str) -> Iterator[None]:
    """Keep the user's other processes on this node from doing at the same time what ``key`` stands for."""
    with (folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def cached(folder: Path, key: str, suffix: str, make: Callable[[Path], None]) -> Path:
    """Return the file that ``make`` once wrote for ``key``; of several processes that ask, one makes it."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32] + suffix
    path = folder / name
    if path.exists():
        return path
    with alone(folder, name):
        if not path.exists():
            unfinished = folder / f"{name}.{os.getpid()}"
            try:
                make(unfinished)
                unfinished.rename(path)
            finally:
                unfinished.unlink(missing_ok=True)
    return path
