"""One continuation of a request on its way through the model."""

from __future__ import annotations

import numpy as np

from mpillama.engine.blocks import BlockManager, chain
from mpillama.engine.request import Request


class Branch:
    """The tokens of one continuation, and where their KV lies. Requests with n > 1 branch after the prompt.

    Attributes:
        tokens: the prompt and what was generated.
        n_past: tokens whose KV is in the cache.
        n_cached: tokens of the prompt that were found there at first; -1 until it is admitted.
        all_rows: whether results are wanted for all tokens of the prompt: for its embedding or its logprobs.
        weight: sequences that it stands for: all of the request's, as long as the prompt is under way.
        in_flight: steps it takes part in that have been submitted and not collected.
        key: order of service, smallest first; never changes, so nothing can be put off for ever.
    """

    def __init__(self, request: Request, index: int, key: tuple[float, int, int], n_ctx: int, block_size: int) -> None:
        self.request, self.index, self.key = request, index, key
        self.embedding = request.params.embedding
        self.tokens = list(request.prompt)
        self.n_past, self.n_cached = 0, -1
        self.all_rows = self.embedding or request.params.prompt_logprobs is not None
        self.weight = request.params.n_branches
        self.in_flight = 0
        self._max_blocks = -(-n_ctx // block_size)
        self._table = np.zeros(0, np.int32)
        self._n_blocks = 0
        self._names: list[bytes] = []
        self._n_registered = self._n_known = 0
        self._announced: list[bytes] = []

    @property
    def pending(self) -> int:
        """Tokens that no step has taken on; 0 while the next one is not known."""
        return len(self.tokens) - self.n_past

    @property
    def table(self) -> np.ndarray:
        """Its KV blocks in order of position, int32."""
        return self._table[: self._n_blocks]

    def _append(self, block: int) -> None:
        if self._n_blocks == len(self._table):
            table = np.full(min(self._max_blocks, max(8, 2 * self._n_blocks)), -1, np.int32)
            table[: self._n_blocks] = self._table
            self._table = table
        self._table[self._n_blocks] = block
        self._n_blocks += 1

    def names(self, n: int, block_size: int) -> list[bytes]:
        """Return the digests of the first ``n`` blocks, which are full."""
        first = len(self._names)
        if n > first:
            content = np.array(self.tokens[first * block_size : n * block_size], np.int32).tobytes()
            size = 4 * block_size
            for at in range(0, len(content), size):
                self._names.append(chain(self._names[-1] if self._names else b"", content[at : at + size]))
        return self._names[:n]

    # -- blocks ----------------------------------------------------------------------------------------------------

    def begin(self, blocks: BlockManager, reserve: int) -> bool:
        """Take known blocks for the beginning and new ones for the rest of all tokens.

        False if there are too few, or if another branch is just computing a block that this one could use.

        Args:
            blocks: of the engine.
            reserve: blocks to leave for others.
        """
        size = blocks.block_size
        n_needed = -(-len(self.tokens) // size)
        # At least one token is left to compute: its logits are wanted.
        names = self.names((len(self.tokens) - 1) // size, size) if self.may_share else []
        known = blocks.find(names)
        if len(known) < len(names) and blocks.is_awaited(names[len(known)]):
            return False
        if n_needed - len(known) + blocks.n_idle(known) + reserve > blocks.n_available:
            return False
        blocks.take(known)
        for block in known:
            self._append(block)
        for _ in range(n_needed - len(known)):
            self._append(blocks.allocate())
        self.n_past = len(known) * size
        self._n_registered = self._n_known = len(known)
        self._announced = names[len(known) :]
        blocks.announce(self._announced)
        if self.n_cached < 0:
            self.n_cached = self.n_past
        return True

    @property
    def may_share(self) -> bool:
        """Whether it may skip tokens that are in the cache."""
        return self.request.params.cache_prompt and not self.all_rows

    def needs_block(self, blocks: BlockManager) -> bool:
        """Whether its next token needs a block of its own: it begins one, or would write into a shared one."""
        at = self.n_past // blocks.block_size
        return at == self._n_blocks or blocks.users(int(self._table[at])) > 1

    def grow(self, blocks: BlockManager) -> None:
        """Take the block that `needs_block` has found missing."""
        at = self.n_past // blocks.block_size
        if at == self._n_blocks:
            self._append(blocks.allocate())
        else:
            self._table[at] = blocks.copy(int(self._table[at]))

    def advance(self, blocks: BlockManager, n: int) -> None:
        """Note that a step computes the next ``n`` tokens; blocks that become full can be found by later steps."""
        self.n_past += n
        if not self.request.params.cache_prompt:
            return
        n_full = self.n_past // blocks.block_size
        if n_full > self._n_registered:
            names = self.names(n_full, blocks.block_size)
            for i in range(self._n_registered, n_full):
                blocks.register(int(self._table[i]), names[i])
            blocks.withdraw(names[self._n_registered :])
            self._n_registered = n_full

    def end(self, blocks: BlockManager) -> None:
        """Give all blocks back; what is cached may be found again."""
        blocks.release(self.table.tolist())
        # What was computed has been withdrawn already, and may meanwhile be announced by another.
        blocks.withdraw(self._announced[self._n_registered - self._n_known :])
        self._announced = []
        self._table = np.zeros(0, np.int32)
        self._n_blocks = self.n_past = self._n_registered = 0

    def fork_into(self, other: Branch, blocks: BlockManager) -> None:
        """Share all blocks with another continuation of the same tokens."""
        blocks.take(self.table.tolist())
        other.all_rows = self.all_rows
        other._table, other._n_blocks = self._table.copy(), self._n_blocks
        other._names, other._n_registered = list(self._names), self._n_registered
        other.tokens, other.n_past, other.n_cached = list(self.tokens), self.n_past, self.n_cached
