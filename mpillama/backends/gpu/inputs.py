"""What the kernels of a step read of its batch: one copy to the device, in a place that can stay from step to step."""

from __future__ import annotations

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.backends.gpu.device import Array, Device

# The smallest bound of the keys that a token sees; the others are its doubles.
_LEAST_SEEN = 256


def seen_bound(batch: Batch) -> int:
    """Return a bound, one of a few, of the number of tokens that any token of the batch sees, itself included."""
    bound, last = _LEAST_SEEN, int(batch.positions.max(initial=0))
    while bound <= last:
        bound *= 2
    return bound


class StepInputs:
    """A batch on the device.

    Args:
        device: where it goes.
        batch: of the step.

    Attributes:
        batch: the one that is on the device now.
        n_seen: see `seen_bound`.
        positions: int32 (T,).
        sequences: int32 (T,), the row of each token's sequence in ``tables``.
        tables: int32 (S, B), KV blocks; B depends on ``n_seen`` alone.

    Raises:
        ValueError: the batch contradicts itself; a mistake of the caller.
    """

    def __init__(self, device: Device, batch: Batch) -> None:
        self._device, self.batch = device, batch
        self.n_seen = seen_bound(batch)
        self._checked: set[tuple[int, int]] = set()
        self._tiles: dict[tuple[int, int, int], tuple[Array, int, int]] = {}
        packed = self._pack(batch)
        self._buffer = device.upload(packed)
        n_tokens, n_rows, n_seqs = len(batch.tokens), len(batch.logit_rows), len(batch.seq_lens)
        ends = np.cumsum([n_tokens, n_tokens, n_tokens, n_rows, packed.size - 3 * n_tokens - n_rows]).tolist()
        starts = [0, *ends[:-1]]
        parts = [self._buffer[start:end] for start, end in zip(starts, ends, strict=True)]
        self._tokens, self.positions, self.sequences, self._rows, tables = parts
        self.tables = tables.reshape(n_seqs, self.n_seen // KV_BLOCK)

    def _pack(self, batch: Batch) -> np.ndarray:
        n_tokens, lengths = len(batch.tokens), batch.seq_lens
        if int(lengths.sum()) != len(batch.positions) or len(batch.positions) != n_tokens or (lengths < 1).any():
            raise ValueError(
                f"sequences of {lengths.tolist()} tokens, but {n_tokens} and {len(batch.positions)} positions"
            )
        jumps = np.flatnonzero(np.diff(batch.positions) != 1) + 1
        if n_tokens and not np.isin(jumps, np.cumsum(lengths)).all():
            raise ValueError("the positions of a sequence do not follow each other")
        width = self.n_seen // KV_BLOCK
        tables = np.full((len(lengths), width), -1, np.int32)
        given = batch.block_tables[:, :width]
        tables[:, : given.shape[1]] = given
        sequences = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        parts = (batch.tokens, batch.positions, sequences, batch.logit_rows, tables.reshape(-1))
        return np.concatenate([part.astype(np.int32, copy=False) for part in parts])

    def update(self, batch: Batch) -> None:
        """Put another batch into the place of this one: with as many tokens, sequences and rows, and the same bound.

        Raises:
            ValueError: see the class and `check`.
        """
        packed = self._pack(batch)
        if packed.size != self._buffer.size or seen_bound(batch) != self.n_seen:
            raise ValueError(f"a batch of {packed.size} numbers in the place of {self._buffer.size}")
        self.batch = batch
        known, self._checked = self._checked, set()
        for n_blocks, window in known:
            self.check(n_blocks, window)
        self._device.write(self._buffer, packed)

    def find(self, x: np.ndarray) -> Array | None:
        """Return the copy of this very array of the batch, if it is one of those that are on the device."""
        if x is self.batch.tokens:
            return self._tokens
        if x is self.batch.positions:
            return self.positions
        return self._rows if x is self.batch.logit_rows else None

    def tiles(self, max_tokens: int, least: int = 1, below: int = 0) -> tuple[Array, int, int]:
        """Return runs of at most so many tokens of one sequence, (n, 2): first, count; n; and the largest count, or 0.

        Only of sequences with at least ``least`` tokens in the step and, unless it is 0, less than ``below``.
        """
        key = max_tokens, least, below
        if key not in self._tiles:
            found, start = [], 0
            for length in self.batch.seq_lens.tolist():
                stop = start + length
                if length >= least and (not below or length < below):
                    found += [(first, min(max_tokens, stop - first)) for first in range(start, stop, max_tokens)]
                start = stop
            tiles = np.array(found, np.int32).reshape(-1, 2)
            self._tiles[key] = self._device.upload(tiles), len(tiles), int(tiles[:, 1].max(initial=0))
        return self._tiles[key]

    def check(self, n_blocks: int, window: int) -> None:
        """Make sure that all tokens, and what they see, are in KV blocks of a cache of so many.

        Raises:
            ValueError: they are not; a mistake of the caller.
        """
        if (n_blocks, window) in self._checked:
            return
        batch = self.batch
        ends = np.cumsum(batch.seq_lens)
        for first, end, table in zip((ends - batch.seq_lens).tolist(), ends.tolist(), batch.block_tables, strict=True):
            low, high = int(batch.positions[first]), int(batch.positions[end - 1])
            oldest = max(0, low - window + 1) if window else 0
            used = table[oldest // KV_BLOCK : high // KV_BLOCK + 1]
            if low < 0 or high // KV_BLOCK >= len(table) or (used < 0).any() or (used >= n_blocks).any():
                raise ValueError(f"positions {low} to {high} are in blocks {used.tolist()} of {n_blocks}")
        self._checked.add((n_blocks, window))
