"""Batches for steps that are recorded and started again."""

from __future__ import annotations

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch


def schedule(rng, n_vocab, n_steps, n_blocks, longest, some_rows=False):
    """Return batches of three sequences that begin, decode in changing company and order, and pause.

    Args:
        rng: random numbers.
        n_vocab: tokens.
        n_steps: batches.
        n_blocks: of the KV cache, divided among the sequences.
        longest: a prompt has fewer tokens.
        some_rows: logits are wanted of some sequences, or of none, and not of all.
    """
    blocks, n_top = rng.permutation(n_blocks).reshape(3, -1), int(rng.choice([0, 7]))
    lengths, batches = np.zeros(3, int), []
    for step in range(n_steps):
        if step < 3:
            parts = [(step, int(rng.integers(1, longest)))]
        else:
            more = 12 if rng.random() < 0.1 else 1
            parts = [(i, int(rng.integers(1, more + 1))) for i in rng.permutation(3)[: rng.integers(1, 4)]]
        room = n_blocks // 3 * KV_BLOCK - lengths
        parts = [(i, min(n, int(room[i]))) for i, n in parts if room[i]]
        positions = np.concatenate([np.arange(lengths[i], lengths[i] + n) for i, n in parts]).astype("i4")
        for i, n in parts:
            lengths[i] += n
        counts = np.array([n for _, n in parts], "i4")
        width = max(-(-lengths[i] // KV_BLOCK) for i, _ in parts)
        rows = rng.permutation(np.cumsum(counts) - 1).astype("i4")
        if some_rows:
            rows = rows[: rng.integers(0, len(parts) + 1)]
        tokens = rng.integers(0, n_vocab, len(positions)).astype("i4")
        tables = np.array([blocks[i, :width] for i, _ in parts], "i4")
        batches.append(Batch(tokens, positions, counts, tables, rows, n_top=n_top))
    return batches
