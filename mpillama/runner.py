"""One rank's share of a model: its weights, its KV cache, and `Runner.run`, called with the same batch on each rank."""

from __future__ import annotations

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.config import Config
from mpillama.models import forward
from mpillama.models.weights import Weights
from mpillama.ops import Ops
from mpillama.sharding import Sharding

KV_BYTES = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18}
"""Bytes of 32 cached elements, by type."""


class Runner:
    """Runs batches on this rank's slices, jointly with the other ranks of its group.

    Args:
        cfg: of the model.
        weights: this rank's.
        ops: of this rank's backend and group.
        n_head_kv: KV heads that this rank holds.
        n_ctx: tokens that the KV cache holds.
        type_k: of cached keys, one of `KV_BYTES`.
        type_v: of cached values, likewise.

    Raises:
        UsageError: heads of this size cannot be cached in these types.
    """

    def __init__(
        self, cfg: Config, weights: Weights, ops: Ops, n_head_kv: int, n_ctx: int, type_k: str, type_v: str
    ) -> None:
        self.cfg, self._weights, self._ops = cfg, weights, ops
        self.type_k, self.type_v = type_k, type_v
        self.n_blocks = -(-n_ctx // KV_BLOCK)
        new_cache = ops.backend.new_cache
        self._caches = [
            new_cache(self.n_blocks, n_head_kv, cfg.n_embd_head_k, cfg.n_embd_head_v, type_k, type_v)
            for _ in range(cfg.n_layer)
        ]

    def run(self, batch: Batch) -> np.ndarray:
        """Return the logits of the wanted tokens, float32 (L, n_vocab), the same on every rank.

        With ``batch.embedding`` their final hidden states, (L, n_embd).
        """
        if len(batch.copies):
            for cache in self._caches:
                self._ops.backend.copy_blocks(cache, batch.copies)
        logits = forward(self._ops, self._weights, self.cfg, self._caches, batch)
        return self._ops.backend.to_host(logits.data)

    @property
    def layers(self) -> range:
        """The blocks of the model whose KV is here."""
        return range(self.cfg.n_layer)

    def read_kv(self, il: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values of KV blocks in block ``il`` of the model; see `Backend.read_blocks`."""
        return self._ops.backend.read_blocks(self._caches[il], blocks)

    def write_kv(self, il: int, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into whole KV blocks."""
        self._ops.backend.write_blocks(self._caches[il], blocks, k, v)


def kv_bytes(cfg: Config, sharding: Sharding, rank: int, n_ctx: int, type_k: str, type_v: str) -> int:
    """Return the bytes of a rank's KV cache."""
    n_tokens = -(-n_ctx // KV_BLOCK) * KV_BLOCK
    per_32 = sharding.cuts["k"].width(rank) * KV_BYTES[type_k] + sharding.cuts["v"].width(rank) * KV_BYTES[type_v]
    return cfg.n_layer * n_tokens * per_32 // 32


def pack(batch: Batch) -> np.ndarray:
    """Return a batch as one int32 array, for the wire."""
    n_seqs, n_table = batch.block_tables.shape
    head = [len(batch.tokens), n_seqs, n_table, len(batch.logit_rows), len(batch.copies), batch.embedding]
    tables, copies = batch.block_tables.ravel(), batch.copies.ravel()
    parts = (batch.tokens, batch.positions, batch.seq_lens, tables, batch.logit_rows, copies)
    return np.concatenate([np.array(head, np.int32), *(part.astype(np.int32, copy=False) for part in parts)])


def unpack(message: np.ndarray) -> Batch:
    """Return the batch that `pack` made ``message`` of."""
    n_tokens, n_seqs, n_table, n_rows, n_copies, embedding = message[:6].tolist()
    sizes = (n_tokens, n_tokens, n_seqs, n_seqs * n_table, n_rows, 2 * n_copies)
    tokens, positions, seq_lens, tables, rows, copies = np.split(message[6:], np.cumsum(sizes)[:-1])
    return Batch(
        tokens, positions, seq_lens, tables.reshape(n_seqs, n_table), rows, copies.reshape(-1, 2), bool(embedding)
    )
