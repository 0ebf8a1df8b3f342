"""The attention of a block: grouped queries, with or without QK-norm, rope, window, softcap and sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpillama.backends.base import Handle
from mpillama.config import Config
from mpillama.models.weights import Weights, project
from mpillama.ops import Ops, Value

if TYPE_CHECKING:
    from mpillama.models.transformer import Step


def attention(ops: Ops, x: Value, w: Weights, cfg: Config, il: int, cache: Handle, step: Step) -> Value:
    """Attend to all tokens so far: x (T, n_embd) to (T, n_embd)."""
    q = project(ops, x, w, "attn_q")
    k = project(ops, x, w, "attn_k")
    v = project(ops, x, w, "attn_v")
    q, k = _qk_norm(ops, q, w, cfg, "attn_q_norm"), _qk_norm(ops, k, w, cfg, "attn_k_norm")
    if cfg.rope_of(il).n_rot:
        table = step.ropes[cfg.rope_of(il)]
        q, k = ops.rope(q, table, cfg.n_embd_head_k), ops.rope(k, table, cfg.n_embd_head_k)
    if step.attn_temperature:
        q = ops.scale(q, step.attn_temperature)
    y = ops.attention(
        q,
        k,
        v,
        cache,
        step.batch,
        n_embd_head=(cfg.n_embd_head_k, cfg.n_embd_head_v),
        scale=cfg.attn_scale,
        softcap=cfg.attn_softcap,
        window=cfg.windows[il],
        sinks=w.optional("attn_sinks.weight"),
    )
    return project(ops, y, w, "attn_output")


def _qk_norm(ops: Ops, x: Value, w: Weights, cfg: Config, name: str) -> Value:
    if not cfg.arch.qk_norm:
        return x
    weight = w.vector(f"{name}.weight")
    if cfg.arch.qk_norm == "full":
        return ops.norm(x, weight, cfg.norm_eps)
    return ops.head_norm(x, weight, cfg.n_embd_head_k, cfg.norm_eps)
