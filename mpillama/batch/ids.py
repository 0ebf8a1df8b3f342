"""Which requests have been answered, in a few bytes each."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np

_MERGE_AT = 1 << 16


class IdSet:
    """A set of strings that keeps 8 bytes of each: a million of them take 8 MB.

    Two of a million different strings are taken for the same with a probability of 3e-8 (n**2 / 2**65).
    """

    def __init__(self) -> None:
        self._sorted = np.zeros(0, np.uint64)
        self._recent: set[int] = set()

    def add(self, text: str) -> bool:
        """Add a string; False if it was there."""
        number = _hash(text)
        if self._has(number):
            return False
        self._recent.add(number)
        if len(self._recent) >= _MERGE_AT:
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return True

    def __contains__(self, text: str) -> bool:
        return self._has(_hash(text))

    def __len__(self) -> int:
        return len(self._sorted) + len(self._recent)

    def _has(self, number: int) -> bool:
        if number in self._recent:
            return True
        at = int(np.searchsorted(self._sorted, np.uint64(number)))
        return at < len(self._sorted) and int(self._sorted[at]) == number


def _hash(text: str) -> int:
    # JSON can name lone surrogates, which UTF-8 cannot hold.
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
