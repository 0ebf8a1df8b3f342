"""The KV cache as blocks: who uses which, which hold the beginning of a prompt that may come again, which are free."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from mpillama.backends.base import KV_BLOCK


def chain(parent: bytes, content: bytes) -> bytes:
    """Return the name of a full block: a digest of its tokens (int32) and, through ``parent``, of all before them.

    A digest, because users choose the tokens: nobody may make a prompt whose block is taken for another one.
    """
    return hashlib.blake2b(content, digest_size=16, key=parent).digest()


def names_of(tokens: Sequence[int], block_size: int = KV_BLOCK) -> list[bytes]:
    """Return the names of the full blocks of a sequence."""
    content, size = np.array(tokens, np.int32).tobytes(), 4 * block_size
    names: list[bytes] = []
    for at in range(0, len(content) - size + 1, size):
        names.append(chain(names[-1] if names else b"", content[at : at + size]))
    return names


class BlockManager:
    """Reference counts of KV blocks, and the cache of full blocks by the digest of all tokens up to their end.

    A block is in use (count above 0), cached (count 0, but named by a digest; the least recently used is given up when
    blocks are needed), or free.

    Args:
        n_blocks: in all.
        block_size: tokens in a block.
    """

    def __init__(self, n_blocks: int, block_size: int = KV_BLOCK) -> None:
        self.n_blocks, self.block_size = n_blocks, block_size
        self.n_used = 0
        self._counts = [0] * n_blocks
        self._names: list[bytes | None] = [None] * n_blocks
        self._by_name: dict[bytes, int] = {}
        self._free = list(range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._copies: list[tuple[int, int]] = []
        self._awaited: set[bytes] = set()

    @property
    def n_available(self) -> int:
        """Blocks that can be allocated now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def n_cached(self) -> int:
        """Blocks that nobody uses and that are kept in case a prompt begins alike."""
        return len(self._cached)

    def users(self, block: int) -> int:
        """Return how many sequences use a block."""
        return self._counts[block]

    # -- the prefix cache ------------------------------------------------------------------------------------------

    def find(self, names: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known beginning of a list of digests; they are not yet taken."""
        found = []
        for name in names:
            block = self._by_name.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def announce(self, names: Iterable[bytes]) -> None:
        """Note that somebody is about to compute blocks of these digests."""
        self._awaited.update(names)

    def withdraw(self, names: Iterable[bytes]) -> None:
        """Note that nobody is any more, or that they have been computed."""
        self._awaited.difference_update(names)

    def is_awaited(self, name: bytes) -> bool:
        """Whether a block of this digest is being computed, so that it pays to wait for it."""
        return name in self._awaited

    def register(self, block: int, name: bytes) -> None:
        """Let a full, computed block be found by its digest; of equal blocks the first one is."""
        if self._names[block] is None and name not in self._by_name:
            self._names[block] = name
            self._by_name[name] = block

    def discard(self, blocks: Iterable[int]) -> int:
        """Let nobody find those of these blocks again that nobody uses; returns how many that were."""
        idle = [block for block in blocks if self._counts[block] == 0]
        for block in idle:
            del self._cached[block]
            self._forget(block)
            self._free.append(block)
        return len(idle)

    def n_idle(self, blocks: Iterable[int]) -> int:
        """Return how many of these blocks are cached and not in use: taking them makes fewer available."""
        return sum(self._counts[block] == 0 for block in blocks)

    # -- use -------------------------------------------------------------------------------------------------------

    def take(self, blocks: Iterable[int]) -> None:
        """Count one more user of each of these blocks, which are in use or cached."""
        for block in blocks:
            if self._counts[block] == 0:
                del self._cached[block]
                self.n_used += 1
            self._counts[block] += 1

    def allocate(self) -> int:
        """Return a block of one's own; the caller has made sure that one is available."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._forget(block)
        self._counts[block] = 1
        self.n_used += 1
        return block

    def _forget(self, block: int) -> None:
        name = self._names[block]
        if name is not None:
            del self._by_name[name]
            self._names[block] = None

    def release(self, blocks: Sequence[int]) -> None:
        """Count one user less of each block of a sequence, given in order of position."""
        # Backwards, so that the end of a prompt is given up before its beginning, without which it is of no use.
        for block in reversed(blocks):
            self._drop(block)

    def _drop(self, block: int) -> None:
        self._counts[block] -= 1
        if self._counts[block]:
            return
        self.n_used -= 1
        if self._names[block] is not None:
            self._cached[block] = None
        else:
            self._free.append(block)

    # -- copy-on-write ---------------------------------------------------------------------------------------------

    def copy(self, block: int) -> int:
        """Return a block of one's own with the content of ``block``; one of its users, of several, moves to it."""
        own = self.allocate()
        self._copies.append((block, own))
        self._counts[block] -= 1
        return own

    def take_copies(self) -> np.ndarray:
        """Return the copies to make before the next step, int32 (C, 2): source, destination.

        No block is both, and no destination is named twice, so they can be made in any order. For a source to become
        free within the same plan, all its other users would have to be sent back to wait; these are neighbours in the
        order of service, so by then nobody is left who could be given a copy.
        """
        copies = np.array(self._copies, np.int32).reshape(-1, 2)
        self._copies = []
        return copies
