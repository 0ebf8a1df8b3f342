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
from mpillama.ops import Ops, Value


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
    for il, cache in zip(blocks, caches, strict=True):
        wanted = batch.logit_rows if il == cfg.n_layer - 1 else None
        h = _block(ops, h, w.block(il), cfg, il, cache, step, wanted)
    return ops.gather(h) if blocks.stop < cfg.n_layer else _head(ops, h, w, cfg, batch)


def _head(ops: Ops, h: Value, w: Weights, cfg: Config, batch: Batch) -> Value:
    h = ops.norm(h, w.vector("output_norm.weight"), cfg.norm_eps)
    if batch.embedding:
        return ops.gather(h)
    logits = ops.scale(project(ops, h, w, "output"), 1.0 / cfg.logit_scale)
    logits = ops.softcap(logits, cfg.final_softcap)
    return ops.top(logits, batch.n_top) if batch.n_top else ops.gather(logits)


def _block(
    ops: Ops, h: Value, w: Weights, cfg: Config, il: int, cache: Handle, step: Step, wanted: np.ndarray | None
) -> Value:
    """One block: attention and a feed-forward network, each added to the residual; keeps the ``wanted`` tokens."""
    arch = cfg.arch
    x = ops.norm(h, w.vector("attn_norm.weight"), cfg.norm_eps) if arch.pre_norms else h
    x = attention(ops, x, w, cfg, il, cache, step)
    if wanted is not None:
        x, h = ops.rows(x, wanted), ops.rows(h, wanted)
    if arch.post_norms:
        x = ops.norm(x, w.vector("post_attention_norm.weight"), cfg.norm_eps)
    h = ops.add(h, ops.scale(x, cfg.residual_scale))

    x = ops.norm(h, w.vector(f"{arch.ffn_norm}.weight"), cfg.norm_eps) if arch.pre_norms else h
    x = experts(ops, x, w, cfg) if cfg.n_expert else dense(ops, x, w, cfg)
    if arch.post_norms:
        x = ops.norm(x, w.vector("post_ffw_norm.weight"), cfg.norm_eps)
    return ops.add(h, ops.scale(x, cfg.residual_scale))


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
