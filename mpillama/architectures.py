"""The architectures, as data: what each one reads from its metadata and how its blocks differ.

What a file says by the presence of a tensor (biases, a tied head) is not repeated here. The facts follow llama.cpp,
whose converter writes these files.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpillama.errors import ModelError


@dataclass(frozen=True)
class Architecture:
    """One GGUF ``general.architecture``.

    Attributes:
        rope_neox: pairs of rope are (i, i + n/2) rather than (2i, 2i + 1).
        rope_factors: reads rope_freqs / rope_factors_long / rope_factors_short.
        yarn_keys: reads beta_fast, beta_slow and log_multiplier from the file instead of taking the defaults.
        activation: ``silu``, ``gelu`` (tanh form) or ``swiglu_oai`` (clamped, gpt-oss).
        window_period: every n-th block has full attention, the others a sliding window, if the file names a window
            and no pattern of its own; 0: windows are never used.
        window_default: window when the file names none (0: none).
        window_rope: rope of windowed blocks: ``same`` as the others, ``own`` (freq_base_swa, 10000 if absent, never
            scaled), or ``unscaled`` (same base, never scaled).
        attn_softcap, final_softcap: read (attn|final)_logit_softcapping; the number is the default, None: not read.
        embedding_scale, residual_scale, logit_scale, attn_scale: ``file`` reads the key of that name; ``sqrt`` is
            sqrt(n_embd); ``n_embd_head_27b`` is gemma's rule for its 27B model.
        attn_temperature: reads attention.temperature_scale (queries grow with the position).
        rope_switch: rope.scaling.finetuned = false turns rope off.
        untied: the file must have output.weight; others without one use token_embd for it.
        pre_norms: blocks have attn_norm and a norm before the feed-forward network, named by ``ffn_norm``.
        post_norms: blocks have post_attention_norm and post_ffw_norm, on what joins the residual.
        qk_norm: ``head`` norms each head of q and k, ``full`` their whole width.
        sinks: attention has one learned sink per query head.
        expert_width: ``n_ff``, or ``file`` for expert_feed_forward_length (n_ff / n_expert_used if absent).
        shared_experts: ``plain``, or ``gated`` by a sigmoid of ffn_gate_inp_shexp.
        expert_norm: the chosen experts' probabilities are normalized to 1.
        expert_gating: ``softmax`` over all experts, or ``softmax_weight`` over the chosen ones.
        ffn_scales, expert_scales: reads the per-tensor ``.scale`` factors of feed-forward and expert weights.
        fused_gate_up: ``ffn_up`` holds gate rows and up rows.
    """

    name: str
    rope_neox: bool = True
    rope_factors: bool = False
    yarn_keys: bool = False
    activation: str = "silu"
    window_period: int = 0
    window_default: int = 0
    window_rope: str = "same"
    attn_softcap: float | None = None
    final_softcap: float | None = None
    embedding_scale: str = ""
    residual_scale: str = ""
    logit_scale: str = ""
    attn_scale: str = ""
    attn_temperature: bool = False
    rope_switch: bool = False
    untied: bool = False
    pre_norms: bool = True
    ffn_norm: str = "ffn_norm"
    post_norms: bool = False
    qk_norm: str = ""
    sinks: bool = False
    expert_width: str = "n_ff"
    shared_experts: str = ""
    expert_norm: bool = False
    expert_gating: str = "softmax"
    ffn_scales: bool = False
    expert_scales: bool = False
    fused_gate_up: bool = False


_LLAMA = Architecture(
    "llama", rope_neox=False, rope_factors=True, expert_norm=True, ffn_scales=True, expert_scales=True
)

ARCHITECTURES: tuple[Architecture, ...] = (
    _LLAMA,
    Architecture(
        "mistral3",
        rope_neox=False,
        rope_factors=True,
        yarn_keys=True,
        attn_temperature=True,
        expert_norm=True,
        ffn_scales=True,
        expert_scales=True,
    ),
    Architecture("qwen2"),
    Architecture("qwen2moe", untied=True, expert_width="file", shared_experts="gated"),
    Architecture("qwen3", qk_norm="head", ffn_scales=True),
    Architecture("qwen3moe", qk_norm="head", expert_width="file", expert_norm=True, expert_scales=True),
    Architecture(
        "gemma2",
        activation="gelu",
        window_period=2,
        window_default=4096,
        attn_softcap=50.0,
        final_softcap=30.0,
        embedding_scale="sqrt",
        attn_scale="n_embd_head_27b",
        post_norms=True,
    ),
    Architecture(
        "gemma3",
        activation="gelu",
        window_period=6,
        window_rope="own",
        final_softcap=0.0,
        embedding_scale="sqrt",
        attn_scale="n_embd_head_27b",
        post_norms=True,
        qk_norm="head",
    ),
    Architecture("phi3", rope_factors=True, fused_gate_up=True),
    Architecture(
        "granite",
        rope_neox=False,
        rope_factors=True,
        embedding_scale="file",
        residual_scale="file",
        logit_scale="file",
        attn_scale="file",
        rope_switch=True,
        shared_experts="plain",
        expert_norm=True,
    ),
    Architecture(
        "olmo2",
        window_period=4,
        window_rope="unscaled",
        untied=True,
        pre_norms=False,
        post_norms=True,
        qk_norm="full",
    ),
    Architecture("olmoe", untied=True, qk_norm="full"),
    Architecture(
        "gpt-oss",
        activation="swiglu_oai",
        window_period=2,
        untied=True,
        sinks=True,
        expert_width="file",
        expert_gating="softmax_weight",
        ffn_norm="post_attention_norm",
    ),
)


def architecture(name: str) -> Architecture:
    """Return the architecture called ``name``.

    Raises:
        ModelError: it is not one of those that mpillama runs.
    """
    for arch in ARCHITECTURES:
        if arch.name == name:
            return arch
    known = ", ".join(arch.name for arch in ARCHITECTURES)
    raise ModelError(f"architecture '{name}' is not supported; mpillama runs {known}")
