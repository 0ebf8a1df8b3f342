"""One rank's share of a model: its weights, its KV cache, and `Runner.run`, called with the same batch on each rank."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np

from mpillama.backends.base import KV_BLOCK, Array, Batch, Handle, Stepper, Stepping
from mpillama.backends.kv_codec import row_bytes
from mpillama.comm.base import Arrival
from mpillama.comm.pipeline import Pipe
from mpillama.comm.virtual import Crew
from mpillama.config import Config
from mpillama.models import forward
from mpillama.models.weights import Weights
from mpillama.ops import Ops
from mpillama.sharding import Sharding
from mpillama.values import Value


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
        type_k: of cached keys, one of `kv_codec.CACHE_TYPES`.
        type_v: of cached values, likewise.
        blocks: of this rank's stage; all by default.
        pipe: the links to the other stages.
        graphs: let a device record steps, where it and its group can.

    Raises:
        UsageError: heads of this size cannot be cached in these types.
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
        graphs: bool = True,
    ) -> None:
        self.cfg, self._ops = cfg, ops
        self.type_k, self.type_v = type_k, type_v
        self._stage, self._pipe = range(cfg.n_layer) if blocks is None else blocks, pipe or Pipe()
        self.n_blocks = -(-n_ctx // KV_BLOCK)
        new_cache = ops.backend.new_cache
        self._caches = [
            new_cache(self.n_blocks, n_head_kv, cfg.n_embd_head_k, cfg.n_embd_head_v, type_k, type_v)
            for _ in self._stage
        ]
        # Not a method: what a device keeps of the work must not keep the runner, whose cache is large.
        self._step = _stepper(ops, partial(_work, ops, weights, cfg, self._caches, self._stage), graphs)

    @property
    def has_all_blocks(self) -> bool:
        """Whether this rank has the logits of every batch: there are no other stages."""
        return len(self._stage) == self.cfg.n_layer

    def run(self, batch: Batch) -> np.ndarray:
        """Return the logits of the wanted tokens, float32 (L, n_vocab), the same on every rank of the last stage.

        With ``batch.n_top`` the largest of them, (L, 2 n_top), as `Backend.top_k` gives them; with ``batch.embedding``
        their final hidden states, (L, n_embd). In a pipeline the first rank has them too; on
        the other ranks of earlier stages the result is the residual.
        """
        return self.begin(batch).wait()

    def begin(self, batch: Batch) -> Arrival:
        """Do this rank's part of `run`; the logits may still be on their way from the last stage.

        The next batch can begin meanwhile, so that all stages of a pipeline are at work; a batch that wants no logits
        need not be waited for.
        """
        pipe, backend = self._pipe, self._ops.backend
        n_logits = len(batch.logit_rows)
        if len(batch.copies):
            for cache in self._caches:
                backend.copy_blocks(cache, batch.copies)
        residual = None
        if pipe.before is not None:
            residual = pipe.before.receive((len(batch.tokens), self.cfg.n_embd))
        result = backend.to_host(self._step(batch, residual))
        logits: Arrival = Here(result)
        if pipe.head is not None:
            # Expected before anything is sent that may have to wait, or the stages would wait for each other in a ring.
            shape = (n_logits, self.cfg.n_embd if batch.embedding else 2 * batch.n_top or self.cfg.n_vocab)
            logits = pipe.head.expect(shape) if n_logits else Here(np.empty(shape, np.float32))
        if pipe.after is not None:
            pipe.after.send(result)
        if pipe.leader is not None and n_logits:
            pipe.leader.send(result)
        return logits

    @property
    def layers(self) -> range:
        """The blocks of the model whose KV is here."""
        return self._stage

    def read_kv(self, il: int, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return keys and values of KV blocks in block ``il`` of the model; see `Backend.read_blocks`."""
        return self._ops.backend.read_blocks(self._caches[il - self._stage.start], blocks)

    def write_kv(self, il: int, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into whole KV blocks."""
        self._ops.backend.write_blocks(self._caches[il - self._stage.start], blocks, k, v)


def _work(
    ops: Ops,
    weights: Weights,
    cfg: Config,
    caches: Sequence[Handle],
    blocks: range,
    batch: Batch,
    residual: Array | None,
) -> Array:
    h = None if residual is None else Value(residual)
    return forward(ops, weights, cfg, caches, batch, blocks, h).data


def _stepper(ops: Ops, work: Callable[[Batch, Array | None], Array], graphs: bool) -> Stepper:
    """Return what runs steps on this backend."""
    backend = ops.backend
    if hasattr(backend, "stepper"):
        return cast(Stepping, backend).stepper(ops, work, graphs)
    return lambda batch, residual: work(batch, None if residual is None else backend.asarray(residual))


class VirtualRunner(Runner):
    """Runs batches on several virtual ranks of this process, each in a thread of its own (see `comm.virtual`).

    Args:
        runners: of the virtual ranks; the first runs in the thread that calls.
        crew: of the groups that they use.
    """

    def __init__(self, runners: Sequence[Runner], crew: Crew) -> None:
        self._runners, self._crew = tuple(runners), crew
        self.cfg, self.n_blocks = runners[0].cfg, runners[0].n_blocks
        self._threads = ThreadPoolExecutor(max(1, len(runners) - 1), "virtual-rank")

    @property
    def has_all_blocks(self) -> bool:
        """Whether this rank has the logits of every batch, which it has."""
        return True

    def begin(self, batch: Batch) -> Arrival:
        """Run a batch to its end."""
        others = [self._threads.submit(self._one, runner, batch) for runner in self._runners[1:]]
        try:
            logits = self._one(self._runners[0], batch)
        except threading.BrokenBarrierError:
            for other in others:
                other.result()
            raise
        for other in others:
            other.result()
        return Here(logits)

    def _one(self, runner: Runner, batch: Batch) -> np.ndarray:
        try:
            return runner.run(batch)
        except BaseException:
            self._crew.barrier.abort()
            raise


def kv_bytes(cfg: Config, sharding: Sharding, rank: int, n_ctx: int, type_k: str, type_v: str) -> int:
    """Return the bytes of a rank's KV cache; ``rank`` is the index within the ranks of ``sharding``."""
    n_tokens = -(-n_ctx // KV_BLOCK) * KV_BLOCK
    cuts = sharding.cuts
    per_token = row_bytes(type_k, cuts["k"].width(rank)) + row_bytes(type_v, cuts["v"].width(rank))
    return len(sharding.blocks) * n_tokens * per_token


def pack(batch: Batch) -> np.ndarray:
    """Return a batch as one int32 array, for the wire."""
    n_seqs, n_table = batch.block_tables.shape
    head = [len(batch.tokens), n_seqs, n_table, len(batch.logit_rows), len(batch.copies), batch.embedding, batch.n_top]
    tables, copies = batch.block_tables.ravel(), batch.copies.ravel()
    parts = (batch.tokens, batch.positions, batch.seq_lens, tables, batch.logit_rows, copies)
    return np.concatenate([np.array(head, np.int32), *(part.astype(np.int32, copy=False) for part in parts)])


def unpack(message: np.ndarray) -> Batch:
    """Return the batch that `pack` made ``message`` of."""
    n_tokens, n_seqs, n_table, n_rows, n_copies, embedding, n_top = message[:7].tolist()
    sizes = (n_tokens, n_tokens, n_seqs, n_seqs * n_table, n_rows, 2 * n_copies)
    tokens, positions, seq_lens, tables, rows, copies = np.split(message[7:], np.cumsum(sizes)[:-1])
    tables, copies = tables.reshape(n_seqs, n_table), copies.reshape(-1, 2)
    return Batch(tokens, positions, seq_lens, tables, rows, copies, bool(embedding), n_top)
