"""The attention of a block: grouped queries, with or without QK-norm, rope, window, softcap and sinks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpillama.backends.base import Handle
from mpillama.config import Config
from mpillama.models.weights import Weights, project, projects
from mpillama.ops import Ops
from mpillama.values import Value

if TYPE_CHECKING:
    from mpillama.models.transformer import Step


def attention(ops: Ops, x: Value, w: Weights, cfg: Config, il: int, cache: Handle, step: Step) -> Value:
    """Attend to all tokens so far: x (T, n_embd) to (T, n_embd)."""
    q, k, v = projects(ops, x, w, "attn_q", "attn_k", "attn_v")
    norms = None
    if cfg.arch.qk_norm == "head" and not step.attn_temperature:
        norms = w.vector("attn_q_norm.weight"), w.vector("attn_k_norm.weight"), cfg.norm_eps
    else:
        q, k = _qk_norm(ops, q, w, cfg, "attn_q_norm"), _qk_norm(ops, k, w, cfg, "attn_k_norm")
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
        rope=step.ropes[il],
        norms=norms,
    )
    return project(ops, y, w, "attn_output")


def _qk_norm(ops: Ops, x: Value, w: Weights, cfg: Config, name: str) -> Value:
    if not cfg.arch.qk_norm:
        return x
    weight = w.vector(f"{name}.weight")
    if cfg.arch.qk_norm == "full":
        return ops.norm(x, weight, cfg.norm_eps)
    return ops.head_norm(x, weight, cfg.n_embd_head_k, cfg.norm_eps)
