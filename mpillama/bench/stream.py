"""How fast memory can be read: the limit of token generation, which reads every weight once for each token."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from mpillama.backends.base import Backend

# Of all ranks of a host together: larger than last-level caches, and than parts of the memory that are faster or slower
# than others. Pieces are large enough that a thread seldom needs the interpreter.
_HOST_BYTES, _THREAD_BYTES = 1 << 30, 64 << 20
_PIECE_BYTES = 8 << 20


def stream_gbps(backend: Backend, n_threads: int, n_sharers: int, seconds: float = 0.4) -> float:
    """Return the GB/s (1e9 bytes) that this rank reads with all of its threads.

    The ``n_sharers`` ranks of a host call this at the same time, and their results add up. A backend that can measure
    it better has a method ``stream_gbps(n_threads, n_bytes)``; NumPy's reductions need several threads to saturate
    memory.
    """
    size = max(n_threads * _THREAD_BYTES, _HOST_BYTES // n_sharers)
    own = getattr(backend, "stream_gbps", None)
    if own is not None:
        return float(own(n_threads, size))
    n_pieces = size // _PIECE_BYTES
    pieces = np.ones((n_pieces, _PIECE_BYTES // 4), np.float32)
    n_bytes = 0
    with ThreadPoolExecutor(n_threads) as pool:
        # maximum rather than add: NumPy adds pairwise, at half of the speed; BLAS would bring its own threads.
        list(pool.map(np.maximum.reduce, pieces))
        began = time.perf_counter()
        while (passed := time.perf_counter() - began) < seconds:
            for _ in pool.map(np.maximum.reduce, pieces):
                n_bytes += _PIECE_BYTES
    return n_bytes / passed / 1e9
