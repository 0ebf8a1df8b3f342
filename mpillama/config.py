"""A model's hyperparameters: GGUF metadata, read the way its architecture reads it, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpillama.architectures import Architecture, architecture
from mpillama.errors import ModelError
from mpillama.gguf.cursor import quoted
from mpillama.gguf.reader import GGUFHeader

# Far above any model there is; a larger number is a damaged file.
MAX_LAYERS = 1024
MAX_WIDTH = 1 << 22
MAX_CONTEXT = 1 << 30
MAX_NUMBER = 1e15
MAX_NAME = 64


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding of one kind of block (RoPE, arXiv:2104.09864; YaRN, arXiv:2309.00071).

    Attributes:
        n_rot: rotated elements of each head; 0 turns rope off.
        freq_base: theta.
        freq_scale: factor on positions (1 / scaling factor).
        ext_factor: how much YaRN mixes extrapolation in (0: plain linear scaling).
        attn_factor: magnitude of the rotated vectors.
        n_ctx_orig: context length of the original training, for YaRN and longrope.
        factors: name of the tensor with a divisor for each frequency, or "".
    """

    n_rot: int
    neox: bool
    freq_base: float
    freq_scale: float = 1.0
    ext_factor: float = 0.0
    attn_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    n_ctx_orig: int = 0
    factors: str = ""


@dataclass(frozen=True)
class Config:
    """Hyperparameters of one model; sizes are those of the whole model, never of a rank."""

    arch: Architecture
    name: str
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_head: int
    n_head_kv: int
    n_embd_head_k: int
    n_embd_head_v: int
    n_ff: int
    n_expert: int
    n_expert_used: int
    n_ff_exp: int
    n_ff_shexp: int
    norm_eps: float
    rope: Rope
    rope_window: Rope
    windows: tuple[int, ...]
    attn_scale: float
    attn_softcap: float
    final_softcap: float
    embedding_scale: float
    residual_scale: float
    logit_scale: float
    attn_temperature_scale: float
    attn_temperature_floor: int

    def rope_of(self, il: int) -> Rope:
        """Return the rope of block ``il``."""
        return self.rope_window if self.windows[il] else self.rope


@dataclass(frozen=True)
class RopeOverrides:
    """What the command line says about rope; None leaves the file's value (flags ``--rope-*`` and ``--yarn-*``)."""

    scaling: str | None = None
    freq_base: float | None = None
    freq_scale: float | None = None
    ext_factor: float | None = None
    attn_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    orig_ctx: int | None = None


class _Keys:
    """Typed, range-checked access to the keys of one architecture."""

    def __init__(self, metadata: Mapping[str, Any], prefix: str) -> None:
        self.metadata, self.prefix = metadata, prefix

    def get(self, key: str) -> Any:
        return self.metadata.get(f"{self.prefix}.{key}")

    def integer(self, key: str, default: int | None = None, low: int = 1, high: int = MAX_WIDTH) -> int:
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value.flat[0]).all():
            value = value.flat[0].item()
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"key {self.prefix}.{key} is {_shown(value)}; a single integer is needed")
        if not low <= value <= high:
            raise ModelError(f"key {self.prefix}.{key} is {value}; it must be between {low} and {high}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_NUMBER:
            raise ModelError(
                f"key {self.prefix}.{key} is {_shown(value)}; a number between 0 and {MAX_NUMBER:g} is needed"
            )
        return float(value)

    def text(self, key: str, default: str) -> str:
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise ModelError(f"key {self.prefix}.{key} is {_shown(value)}; a text is needed")
        return value or default

    def missing(self, key: str) -> ModelError:
        return ModelError(f"the model has no key {self.prefix}.{key}; the file is incomplete, convert it again")


def _shown(value: Any) -> str:
    """Return a metadata value for a message of one line."""
    if isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, str):
        return quoted(value)
    return f"an array of {len(value)} values"


def read_config(header: GGUFHeader, n_ctx: int = 0, overrides: RopeOverrides | None = None) -> Config:
    """Read the hyperparameters of a model.

    Args:
        header: of the model's file.
        n_ctx: context length of the run (longrope chooses its factors by it); 0: the training context.
        overrides: rope settings of the command line.

    Raises:
        ModelError: unknown architecture; a key that is missing or absurd.
    """
    name = header.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ModelError("the file has no general.architecture; it is not a language model in GGUF format")
    if not name.isprintable() or len(name) > MAX_NAME:
        raise ModelError(f"general.architecture is {quoted(name)}, which is no architecture; the file is damaged")
    arch = architecture(name)
    keys = _Keys(header.metadata, name)

    n_embd = keys.integer("embedding_length")
    n_layer = keys.integer("block_count", high=MAX_LAYERS)
    n_head = keys.integer("attention.head_count", high=1 << 14)
    n_head_kv = keys.integer("attention.head_count_kv", n_head, high=1 << 14)
    if n_head % n_head_kv:
        raise ModelError(
            f"key {name}.attention.head_count is {n_head}, not a multiple of the {n_head_kv} of head_count_kv"
        )
    if n_embd < n_head:
        raise ModelError(f"key {name}.attention.head_count is {n_head}, more than embedding_length, {n_embd}")
    n_embd_head_k = keys.integer("attention.key_length", n_embd // n_head)
    n_ctx_train = keys.integer("context_length", high=MAX_CONTEXT)
    n_expert = keys.integer("expert_count", 0, low=0, high=1 << 12)
    n_expert_used = keys.integer("expert_used_count", 0, low=0, high=max(n_expert, 0)) if n_expert else 0
    if n_expert and not n_expert_used:
        raise ModelError(f"the model has {n_expert} experts but key {name}.expert_used_count says 0 are used")
    if keys.integer("expert_group_count", 0, low=0) > 1:
        raise ModelError("expert groups (expert_group_count > 1) are not supported yet")

    n_ff = keys.integer("feed_forward_length", 0, low=0)
    n_ff_exp = n_ff if arch.expert_width == "n_ff" else keys.integer("expert_feed_forward_length", 0, low=0)
    if n_expert and not n_ff_exp:
        n_ff_exp = n_ff // n_expert_used
    n_ff_shexp = keys.integer("expert_shared_feed_forward_length", 0, low=0) if arch.shared_experts else 0
    if arch.shared_experts == "gated" and not n_ff_shexp:
        n_ff_shexp = n_ff
    if not (n_ff_exp if n_expert else n_ff):
        raise keys.missing("feed_forward_length")

    embd = header.tensors.get("token_embd.weight")
    if embd is None:
        raise ModelError("the model has no tensor token_embd.weight; the file is incomplete, convert it again")
    if len(embd.shape) != 2:
        raise ModelError(f"tensor token_embd.weight has {len(embd.shape)} axes instead of 2; convert the model again")

    rope = _rope(keys, arch, n_embd_head_k, n_ctx_train, n_ctx or n_ctx_train, header, overrides or RopeOverrides())
    windows = _windows(keys, arch, n_layer)
    title = header.metadata.get("general.name")
    return Config(
        arch=arch,
        name=title if isinstance(title, str) else name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_vocab=embd.shape[1],
        n_ctx_train=n_ctx_train,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_embd_head_k=n_embd_head_k,
        n_embd_head_v=keys.integer("attention.value_length", n_embd // n_head),
        n_ff=n_ff,
        n_expert=n_expert,
        n_expert_used=n_expert_used,
        n_ff_exp=n_ff_exp,
        n_ff_shexp=n_ff_shexp,
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope=rope,
        rope_window=_window_rope(keys, arch, rope),
        windows=windows,
        attn_scale=_attn_scale(keys, arch, n_embd, n_head, n_embd_head_k, n_layer),
        attn_softcap=_softcap(keys, "attn_logit_softcapping", arch.attn_softcap),
        final_softcap=_softcap(keys, "final_logit_softcapping", arch.final_softcap),
        embedding_scale=_embedding_scale(keys, arch, n_embd),
        residual_scale=(keys.number("residual_scale", 0.0) if arch.residual_scale else 0.0) or 1.0,
        logit_scale=(keys.number("logit_scale") if arch.logit_scale else 0.0) or 1.0,
        attn_temperature_scale=keys.number("attention.temperature_scale", 0.0) if arch.attn_temperature else 0.0,
        attn_temperature_floor=rope.n_ctx_orig,
    )


def _rope(
    keys: _Keys,
    arch: Architecture,
    n_embd_head: int,
    n_ctx_train: int,
    n_ctx: int,
    header: GGUFHeader,
    over: RopeOverrides,
) -> Rope:
    n_rot = keys.integer("rope.dimension_count", n_embd_head, low=0, high=n_embd_head)
    if n_rot % 2:
        raise ModelError(f"key {keys.prefix}.rope.dimension_count is {n_rot}; it must be even")
    finetuned = keys.get("rope.scaling.finetuned")
    if arch.rope_switch and finetuned is False:
        n_rot = 0
    kind = over.scaling or keys.text("rope.scaling.type", "linear")
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise ModelError(
            f"rope scaling type {quoted(kind)} is not supported; mpillama knows none, linear, yarn and longrope"
        )
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0)
    scale = over.freq_scale or (1.0 / factor if factor else 1.0)
    if kind == "none":
        scale = 1.0
    n_ctx_orig = over.orig_ctx or keys.integer("rope.scaling.original_context_length", 0, low=0, high=MAX_CONTEXT)
    n_ctx_orig = n_ctx_orig or n_ctx_train
    ext_factor = over.ext_factor if over.ext_factor is not None and over.ext_factor >= 0 else float(kind == "yarn")
    log_mul = keys.number("rope.scaling.yarn_log_multiplier", 0.0) if arch.yarn_keys else 0.0
    attn_factor = over.attn_factor if over.attn_factor is not None and over.attn_factor >= 0 else 1.0
    if ext_factor:
        # The magnitude that YaRN asks for, relative to that of the length the model was trained on.
        attn_factor = _yarn_magnitude(1.0 / scale, 1.0) / (_yarn_magnitude(1.0 / scale, log_mul) if log_mul else 1.0)
    beta_fast, beta_slow = 32.0, 1.0
    if arch.yarn_keys:
        beta_fast = keys.number("rope.scaling.yarn_beta_fast", beta_fast)
        beta_slow = keys.number("rope.scaling.yarn_beta_slow", beta_slow)
    rope = Rope(
        n_rot=n_rot,
        neox=arch.rope_neox,
        freq_base=over.freq_base or keys.number("rope.freq_base", 10000.0),
        freq_scale=scale,
        ext_factor=ext_factor,
        attn_factor=attn_factor * keys.number("rope.scaling.attn_factor", 1.0),
        beta_fast=over.beta_fast if over.beta_fast is not None and over.beta_fast >= 0 else beta_fast,
        beta_slow=over.beta_slow if over.beta_slow is not None and over.beta_slow >= 0 else beta_slow,
        n_ctx_orig=n_ctx_orig,
        factors=_rope_factors(arch, n_ctx > n_ctx_orig, header),
    )
    return _checked(rope)


def _checked(rope: Rope) -> Rope:
    """Return a rope whose angles can be computed: no logarithm of 0, nothing infinite."""
    for what, value, low in (
        ("base frequency", rope.freq_base, 1.001),
        ("frequency scale", rope.freq_scale, 1e-9),
        ("magnitude", rope.attn_factor, 1e-9),
        ("YaRN beta_fast", rope.beta_fast, 1e-9),
        ("YaRN beta_slow", rope.beta_slow, 1e-9),
        ("YaRN mix", rope.ext_factor, 0.0),
    ):
        if not low <= value <= MAX_NUMBER:
            raise ModelError(
                f"rope has the {what} {value:g}, which must be between {low:g} and {MAX_NUMBER:g}; "
                "correct the flag that sets it, or convert the model again"
            )
    return rope


def _yarn_magnitude(factor: float, mscale: float) -> float:
    """Return YaRN's factor on the rotated vectors, 0.1 ln(s) + 1 (arXiv:2309.00071, section 3.4)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _rope_factors(arch: Architecture, beyond_training: bool, header: GGUFHeader) -> str:
    if not arch.rope_factors:
        return ""
    longrope = "rope_factors_long.weight" if beyond_training else "rope_factors_short.weight"
    return next((name for name in ("rope_freqs.weight", longrope) if name in header.tensors), "")


def _window_rope(keys: _Keys, arch: Architecture, rope: Rope) -> Rope:
    if arch.window_rope == "own":
        unscaled = 1.0 if rope.ext_factor else rope.attn_factor
        base = keys.number("rope.freq_base_swa", 10000.0)
        return _checked(replace(rope, freq_base=base, freq_scale=1.0, ext_factor=0.0, attn_factor=unscaled))
    if arch.window_rope == "unscaled":
        return replace(rope, freq_scale=1.0, ext_factor=0.0, attn_factor=1.0)
    base = keys.number("rope.freq_base_swa", rope.freq_base) if arch.window_period else rope.freq_base
    return _checked(replace(rope, freq_base=base))


def _windows(keys: _Keys, arch: Architecture, n_layer: int) -> tuple[int, ...]:
    """Return the sliding window of each block in tokens, the token itself included; 0: full attention."""
    if not arch.window_period:
        return (0,) * n_layer
    window = keys.integer("attention.sliding_window", arch.window_default, low=0, high=MAX_CONTEXT)
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, np.ndarray):
        if pattern.size < n_layer:
            raise ModelError(f"attention.sliding_window_pattern has {pattern.size} entries for {n_layer} blocks")
        return tuple(window if windowed else 0 for windowed in pattern[:n_layer].tolist())
    period = keys.integer("attention.sliding_window_pattern", arch.window_period, low=0)
    return tuple(window if period == 0 or il % period < period - 1 else 0 for il in range(n_layer))


def _attn_scale(keys: _Keys, arch: Architecture, n_embd: int, n_head: int, n_embd_head: int, n_layer: int) -> float:
    if arch.attn_scale == "file":
        return keys.number("attention.scale", 0.0) or 1.0 / math.sqrt(n_embd_head)
    if arch.attn_scale == "n_embd_head_27b" and n_layer == {"gemma2": 46, "gemma3": 62}[arch.name]:
        return 1.0 / math.sqrt(n_embd // n_head)
    return 1.0 / math.sqrt(n_embd_head)


def _softcap(keys: _Keys, key: str, default: float | None) -> float:
    return 0.0 if default is None else keys.number(key, default)


def _embedding_scale(keys: _Keys, arch: Architecture, n_embd: int) -> float:
    if arch.embedding_scale == "sqrt":
        return math.sqrt(n_embd)
    return (keys.number("embedding_scale", 0.0) if arch.embedding_scale else 0.0) or 1.0
