"""Where a model's files lie, and how fast they can be read."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

SLOW_FILES = frozenset({"nfs", "nfs4", "cifs", "fuse.sshfs", "9p", "smb3", "afs"})
PARALLEL_FILES = frozenset({"lustre", "gpfs", "beegfs", "panfs", "wekafs", "daos", "ceph", "pvfs2", "fuse.glusterfs"})
"""Types of file systems that several hosts read at the same time: by way of one server, and of many."""

_PIECE = 4 << 20


def file_system(path: Path, mounts: str | None = None) -> tuple[str, str]:
    """Return the type and the mount point of the file system of a path, from the text of /proc/self/mountinfo."""
    if mounts is None:
        source = Path("/proc/self/mountinfo")
        mounts = source.read_text() if source.exists() else ""
    real = os.path.realpath(path)
    best, found = -1, ("", "")
    for line in mounts.splitlines():
        left, dash, right = line.partition(" - ")
        words = left.split()
        if not dash or len(words) < 5:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        prefix = point.rstrip("/") + "/"
        # Of several on the same point the last one is seen.
        if (real + "/").startswith(prefix) and len(prefix) >= best:
            best, found = len(prefix), (right.split()[0], point)
    return found


def read_speed(paths: Iterable[str], rank: int, size: int, n_bytes: int = 64 << 20) -> tuple[int, float]:
    """Read a part of a model that other ranks do not read at this time; returns bytes and seconds.

    What the host has cached of that part is dropped first, as far as the system lets it.
    """
    path = next(iter(paths))
    length = os.path.getsize(path)
    share = min(n_bytes, length // size)
    start = length // size * rank // _PIECE * _PIECE
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, start, share, os.POSIX_FADV_DONTNEED)
        buffer, done = memoryview(bytearray(_PIECE)), 0
        began = time.perf_counter()
        while done < share:
            n = os.preadv(fd, [buffer[: share - done]], start + done)
            if not n:
                break
            done += n
        return done, time.perf_counter() - began
    finally:
        os.close(fd)
