"""The decoder: embedding, blocks, head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import Batch, Handle
from mpillama.config import Config, Rope
from mpillama.models.attention import attention
from mpillama.models.ffn import dense, experts
from mpillama.models.weights import Weights, project
from mpillama.ops import Ops
from mpillama.values import Branch, Value


@dataclass(frozen=True)
class Step:
    """What all blocks of one step share.

    Attributes:
        batch: tokens, positions, KV blocks.
        ropes: for each block, the rotations of the step's tokens, or None.
        attn_temperature: factor on each token's queries (T, 1), or None.
    """

    batch: Batch
    ropes: Mapping[int, Handle | None]
    attn_temperature: Value | None


class Residual:
    """The sum that every block adds to. A branch joins it together with the norm that reads it next.

    Args:
        ops: of the device.
        h: the sum so far (T, n_embd).
        eps: of all norms.
    """

    def __init__(self, ops: Ops, h: Value, eps: float) -> None:
        self._ops, self._h, self._eps = ops, h, eps
        self._branch: Branch | None = None

    def add(self, branch: Branch) -> None:
        """Add what a block has computed."""
        self._h, self._branch = self.sum(), branch

    def sum(self) -> Value:
        """Return the sum."""
        if self._branch:
            self._h, self._branch = self._ops.join(self._h, self._branch, self._eps), None
        return self._h

    def norm(self, w: Value) -> Value:
        """Return the norm of the sum."""
        if self._branch is None:
            return self._ops.norm(self._h, w, self._eps)
        self._h, x = self._ops.join_norm(self._h, self._branch, w, self._eps)
        self._branch = None
        return x

    def keep(self, index: np.ndarray) -> None:
        """Go on with these tokens."""
        self._h = self._ops.rows(self.sum(), index)


def forward(
    ops: Ops,
    w: Weights,
    cfg: Config,
    caches: Sequence[Handle],
    batch: Batch,
    blocks: range | None = None,
    h: Value | None = None,
) -> Value:
    """Run the model, or a range of its blocks, on a batch.

    Args:
        ops: of the device.
        w: weights; those of ``blocks`` are enough, with the embedding for the first and the head for the last block.
        cfg: of the model.
        caches: KV caches of ``blocks``.
        batch: the tokens.
        blocks: consecutive blocks; all by default.
        h: the residual (T, n_embd) that the block before ``blocks`` has left; not for the first block.

    Returns:
        The logits (L, V) of the tokens in ``batch.logit_rows``, with ``batch.n_top`` the largest of them, (L, 2 n_top),
        with ``batch.embedding`` the hidden states after the last norm, (L, n_embd); or the residual (T, n_embd) after
        ``blocks`` if the last block is not among them.
        Whole on every rank.
    """
    blocks = range(cfg.n_layer) if blocks is None else blocks
    step = Step(batch, _rope_tables(ops, w, cfg, blocks, batch), _attn_temperature(ops, cfg, batch))
    if h is None:
        h = ops.scale(ops.embedding(batch.tokens, w.matrix("token_embd")), cfg.embedding_scale)
    residual = Residual(ops, h, cfg.norm_eps)
    for il, cache in zip(blocks, caches, strict=True):
        wanted = batch.logit_rows if il == cfg.n_layer - 1 else None
        _block(ops, residual, w.block(il), cfg, il, cache, step, wanted)
    return ops.gather(residual.sum()) if blocks.stop < cfg.n_layer else _head(ops, residual, w, cfg, batch)


def _head(ops: Ops, residual: Residual, w: Weights, cfg: Config, batch: Batch) -> Value:
    h = residual.norm(w.vector("output_norm.weight"))
    if batch.embedding:
        return ops.gather(h)
    logits = ops.scale(project(ops, h, w, "output"), 1.0 / cfg.logit_scale)
    logits = ops.softcap(logits, cfg.final_softcap)
    return ops.top(logits, batch.n_top) if batch.n_top else ops.gather(logits)


def _block(
    ops: Ops, residual: Residual, w: Weights, cfg: Config, il: int, cache: Handle, step: Step, wanted: np.ndarray | None
) -> None:
    """One block: attention and a feed-forward network, each added to the residual; keeps the ``wanted`` tokens."""
    arch = cfg.arch
    x = residual.norm(w.vector("attn_norm.weight")) if arch.pre_norms else residual.sum()
    x = attention(ops, x, w, cfg, il, cache, step)
    if wanted is not None:
        x = ops.rows(x, wanted)
        residual.keep(wanted)
    post = w.vector("post_attention_norm.weight") if arch.post_norms else None
    residual.add(Branch(x, post, cfg.residual_scale))

    x = residual.norm(w.vector(f"{arch.ffn_norm}.weight")) if arch.pre_norms else residual.sum()
    post = w.vector("post_ffw_norm.weight") if arch.post_norms else None
    if cfg.n_expert:
        y, chosen = experts(ops, x, w, cfg)
        residual.add(Branch(y, post, cfg.residual_scale, chosen))
    else:
        residual.add(Branch(dense(ops, x, w, cfg), post, cfg.residual_scale))


def _rope_tables(ops: Ops, w: Weights, cfg: Config, blocks: range, batch: Batch) -> dict[int, Handle | None]:
    # By identity, because a model has one or two and comparing their many fields takes long.
    kinds: dict[int, Rope] = {id(rope): rope for rope in map(cfg.rope_of, blocks) if rope.n_rot}
    tables = {
        kind: ops.rope_table(batch.positions, rope, w.vector(rope.factors) if rope.factors else None)
        for kind, rope in kinds.items()
    }
    return {il: tables.get(id(cfg.rope_of(il))) for il in blocks}


def _attn_temperature(ops: Ops, cfg: Config, batch: Batch) -> Value | None:
    if not cfg.attn_temperature_scale:
        return None
    span, scale = cfg.attn_temperature_floor, cfg.attn_temperature_scale
    return Value(ops.backend.attn_temperature(batch.positions, span, scale))
