"""Feed-forward networks: gated dense, and mixtures of gated experts with or without a shared one."""

from __future__ import annotations

from mpillama.config import Config
from mpillama.models.weights import Weights, project
from mpillama.ops import Ops
from mpillama.values import Experts, Value


def dense(ops: Ops, x: Value, w: Weights, cfg: Config, suffix: str = "") -> Value:
    """Compute down(act(gate(x)) * up(x)); here a weight's scale comes after its bias."""
    gate, up = f"ffn_gate{suffix}", f"ffn_up{suffix}"
    if w.is_plain(gate) and w.is_plain(up):
        y = ops.gated_linear(cfg.arch.activation, x, w.matrix(gate), w.matrix(up))
    else:
        y = ops.gated(cfg.arch.activation, *(_biased_then_scaled(ops, x, w, name) for name in (gate, up)))
    return _biased_then_scaled(ops, y, w, f"ffn_down{suffix}")


def _biased_then_scaled(ops: Ops, x: Value, w: Weights, name: str) -> Value:
    y = ops.linear(x, w.matrix(name))
    scale, bias = w.scale_and_bias(name)
    y = ops.add(y, bias) if bias else y
    return ops.scale(y, scale) if scale else y


def experts(ops: Ops, x: Value, w: Weights, cfg: Config) -> tuple[Value, Experts | None]:
    """Send each token to its experts; returns their answers, to be summed by their weights.

    If there is a shared expert, the sum of all instead, and None.
    """
    arch = cfg.arch
    chosen = ops.route(project(ops, x, w, "ffn_gate_inp"), cfg.n_expert_used, arch.expert_gating, arch.expert_norm)
    gate = _expert_project(ops, x, w, "ffn_gate_exps", chosen)
    up = _expert_project(ops, x, w, "ffn_up_exps", chosen)
    down = _expert_project(ops, ops.gated(arch.activation, gate, up), w, "ffn_down_exps", chosen)
    if not cfg.n_ff_shexp:
        return down, chosen
    shared = dense(ops, x, w, cfg, "_shexp")
    if arch.shared_experts == "gated":
        shared = ops.scale(shared, ops.sigmoid(ops.linear(x, w.matrix("ffn_gate_inp_shexp"))))
    return ops.add(ops.expert_sum(down, chosen), shared), None


def _expert_project(ops: Ops, x: Value, w: Weights, name: str, chosen: Experts) -> Value:
    y = ops.expert_linear(x, w.matrix(name), chosen)
    scale, bias = w.scale_and_bias(name)
    y = ops.expert_scale(y, scale, chosen) if scale else y
    return ops.expert_bias(y, bias, chosen) if bias else y
