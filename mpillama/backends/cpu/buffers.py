"""Arrays for the results of large steps, used again: those of new ones the system would fill with zeros each time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod
from threading import Lock

import numpy as np

# Bytes of an array that is worth being kept: smaller ones the C library keeps.
_LEAST = 128 << 10
# Of arrays that are kept without being used; a block of a model needs few at a time.
_MAX_FREE, _MAX_FREE_BYTES = 8, 256 << 20


class Buffers:
    """Gives out arrays whose memory is used again when nobody refers to them any more; may be shared by threads."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        self._lock = Lock()

    def empty(self, shape: Sequence[int]) -> np.ndarray:
        """Return a contiguous float32 array of this shape, with anything in it."""
        n = prod(shape)
        if 4 * n < _LEAST:
            return np.empty(shape, np.float32)
        with self._lock:
            kept = self._kept
            # Arrays that were given out refer to the one here; else there are the list's reference and the call's own.
            free = [i for i in range(len(kept)) if sys.getrefcount(kept[i]) == 2]
            fitting = min((i for i in free if n <= kept[i].size <= 2 * n), key=lambda i: kept[i].size, default=None)
            if fitting is None:
                n_bytes = sum(kept[i].nbytes for i in free)
                for dropped, i in enumerate(free):
                    if len(free) - dropped < _MAX_FREE and n_bytes + 4 * n <= _MAX_FREE_BYTES:
                        break
                    n_bytes -= kept[i - dropped].nbytes
                    # The one that was made first.
                    del kept[i - dropped]
                kept.append(np.empty(n, np.float32))
                fitting = -1
            return kept[fitting][:n].reshape(shape)
