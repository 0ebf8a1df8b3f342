"""A sequence of tokens on its way through the model: what has been computed, what is pending, where its KV lies."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch


class Sequence:
    """Tokens of one sequence; its KV cache is the blocks of ``block_table``, KV_BLOCK tokens each."""

    def __init__(self, tokens: Iterable[int], block_table: np.ndarray) -> None:
        self.tokens = list(tokens)
        self.block_table = np.asarray(block_table, np.int32)
        self.n_past = 0

    @property
    def n_ctx(self) -> int:
        """Tokens that its KV blocks can hold."""
        return len(self.block_table) * KV_BLOCK

    @property
    def pending(self) -> int:
        """Tokens whose KV has not been computed."""
        return len(self.tokens) - self.n_past

    def next_batch(self, n_max: int, all_logits: bool = False) -> Batch:
        """Take up to ``n_max`` pending tokens as the next batch, which must then be run.

        Logits are wanted of all of them, or of the last token if it is the last pending one.
        """
        start, stop = self.n_past, min(len(self.tokens), self.n_past + n_max)
        n = stop - start
        if all_logits:
            rows = np.arange(n, dtype=np.int32)
        else:
            rows = np.arange(n - 1 if stop == len(self.tokens) else n, n, dtype=np.int32)
        self.n_past = stop
        n_blocks = -(-stop // KV_BLOCK)
        return Batch(
            tokens=np.array(self.tokens[start:stop], np.int32),
            positions=np.arange(start, stop, dtype=np.int32),
            seq_lens=np.array([n], np.int32),
            block_tables=self.block_table[None, :n_blocks],
            logit_rows=rows,
        )
