"""One rank's share of a model: its weights, its KV cache, and `Runner.run`, called with the same batch on each rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.comm.base import Arrival
from mpillama.comm.pipeline import Pipe
from mpillama.config import Config
from mpillama.errors import UsageError
from mpillama.models import forward
from mpillama.models.weights import Weights
from mpillama.ops import Ops, Value
from mpillama.sharding import Sharding

KV_BYTES = {"f32": 128, "f16": 64, "bf16": 64, "q8_0": 34, "q4_0": 18}
"""Bytes of 32 cached elements, by type."""


@dataclass(frozen=True)
class Here:
    """An array that does not have to travel."""

    x: np.ndarray

    def wait(self) -> np.ndarray:
        """Return it."""
        return self.x


class Runner:
    """Runs batches on this rank's slices, jointly with the other ranks of its group and the stages before and after.

    Args:
        cfg: of the model.
        weights: this rank's.
        ops: of this rank's backend and group.
        n_head_kv: KV heads that this rank holds.
        n_ctx: tokens that the KV cache holds.
        type_k: of cached keys, one of `KV_BYTES`; which ones there are depends on the backend and the size of heads.
        type_v: of cached values, likewise.
        blocks: of this rank's stage; all by default.
        pipe: the links to the other stages.

    Raises:
        UsageError: the backend cannot cache these heads in these types.
    """

    def __init__(
        self,
        cfg: Config,
        weights: Weights,
        ops: Ops,
        n_head_kv: int,
        n_ctx: int,
        type_k: str,
        type_v: str,
        blocks: range | None = None,
        pipe: Pipe | None = None,
    ) -> None:
        self.cfg, self._weights, self._ops = cfg, weights, ops
        self._stage, self._pipe = range(cfg.n_layer) if blocks is None else blocks, pipe or Pipe()
        self.n_blocks = -(-n_ctx // KV_BLOCK)
        quantized = sorted({type_k, type_v} & {"q8_0", "q4_0"})
        if quantized and ops.backend.name == "reference":
            raise UsageError(f"the reference backend has no KV cache of type {quantized[0]}; use f32, f16 or bf16")
        new_cache = ops.backend.new_cache
        self._caches = [
            new_cache(self.n_blocks, n_head_kv, cfg.n_embd_head_k, cfg.n_embd_head_v, type_k, type_v)
            for _ in self._stage
        ]

    def run(self, batch: Batch) -> np.ndarray:
        """Return the logits of the wanted tokens, float32 (L, n_vocab), the same on every rank of the last stage.

        In a pipeline the first rank has them too; on the other ranks of earlier stages the result is the residual.
        """
        return self.begin(batch).wait()

    def begin(self, batch: Batch) -> Arrival:
        """Do this rank's part of `run`; the logits may still be on their way from the last stage.

        The next batch can begin meanwhile, so that all stages of a pipeline are at work; a batch that wants no logits
        need not be waited for.
        """
        pipe, backend = self._pipe, self._ops.backend
        n_logits = len(batch.logit_rows)
        h = None
        if pipe.before is not None:
            h = Value(backend.asarray(pipe.before.receive((len(batch.tokens), self.cfg.n_embd))))
        out = forward(self._ops, self._weights, self.cfg, self._caches, batch, self._stage, h)
        result = backend.to_host(out.data)
        logits: Arrival = Here(result)
        if pipe.head is not None:
            # Expected before anything is sent that may have to wait, or the stages would wait for each other in a ring.
            shape = (n_logits, self.cfg.n_vocab)
            logits = pipe.head.expect(shape) if n_logits else Here(np.empty(shape, np.float32))
        if pipe.after is not None:
            pipe.after.send(result)
        if pipe.leader is not None and n_logits:
            pipe.leader.send(result)
        return logits


def kv_bytes(cfg: Config, sharding: Sharding, rank: int, n_ctx: int, type_k: str, type_v: str) -> int:
    """Return the bytes of a rank's KV cache; ``rank`` is the index within the ranks of ``sharding``."""
    n_tokens = -(-n_ctx // KV_BLOCK) * KV_BLOCK
    per_32 = sharding.cuts["k"].width(rank) * KV_BYTES[type_k] + sharding.cuts["v"].width(rank) * KV_BYTES[type_v]
    return len(sharding.blocks) * n_tokens * per_32 // 32


def pack(batch: Batch) -> np.ndarray:
    """Return a batch as one int32 array, for the wire."""
    head = [len(batch.tokens), len(batch.seq_lens), batch.block_tables.shape[1], len(batch.logit_rows)]
    parts = (batch.tokens, batch.positions, batch.seq_lens, batch.block_tables.ravel(), batch.logit_rows)
    return np.concatenate([np.array(head, np.int32), *(part.astype(np.int32, copy=False) for part in parts)])


def unpack(message: np.ndarray) -> Batch:
    """Return the batch that `pack` made ``message`` of."""
    n_tokens, n_seqs, n_table, n_rows = message[:4].tolist()
    sizes = (n_tokens, n_tokens, n_seqs, n_seqs * n_table, n_rows)
    tokens, positions, seq_lens, tables, rows = np.split(message[4:], np.cumsum(sizes)[:-1])
    return Batch(tokens, positions, seq_lens, tables.reshape(n_seqs, n_table), rows)
