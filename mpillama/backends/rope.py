"""Rotary position embedding in NumPy: linear, YaRN, llama3 and longrope scalings."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from mpillama.config import Rope


@dataclass(frozen=True)
class RopeTable:
    """Rotations of a step's tokens: cos and sin (T, 1, n_rot / 2), float32, magnitude included."""

    cos: np.ndarray
    sin: np.ndarray
    neox: bool


def frequencies(rope: Rope, factors: np.ndarray | None) -> np.ndarray:
    """Return the angle per position of each pair, float64 (n_rot / 2,).

    Linear scaling slows all pairs by ``freq_scale``. YaRN (arXiv:2309.00071, section 3.2) leaves the pairs alone that
    turn more than ``beta_fast`` times within the original context, slows those that turn less than ``beta_slow``
    times, and mixes in between. llama3 and longrope come as a divisor for each pair.
    """
    pair = np.arange(rope.n_rot // 2, dtype=np.float64)
    theta = rope.freq_base ** (-2.0 * pair / rope.n_rot)
    if factors is not None:
        theta = theta / factors.astype(np.float64)
    slow = theta * rope.freq_scale
    if rope.ext_factor == 0.0:
        return slow

    def pair_that_turns(times: float) -> float:
        return rope.n_rot * math.log(rope.n_ctx_orig / (times * 2 * math.pi)) / (2 * math.log(rope.freq_base))

    low = max(0.0, math.floor(pair_that_turns(rope.beta_fast)))
    high = min(rope.n_rot - 1.0, math.ceil(pair_that_turns(rope.beta_slow)))
    ramp = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
    mix = ramp * rope.ext_factor
    return slow * (1.0 - mix) + theta * mix


def rope_table(positions: np.ndarray, rope: Rope, factors: np.ndarray | None) -> RopeTable:
    """Return the rotations of tokens at ``positions`` (T,); angles are float64 until the cosine is taken."""
    angle = positions.astype(np.float64)[:, None, None] * frequencies(rope, factors)
    cos = (np.cos(angle) * rope.attn_factor).astype(np.float32)
    sin = (np.sin(angle) * rope.attn_factor).astype(np.float32)
    return RopeTable(cos, sin, rope.neox)


def rotate(x: np.ndarray, table: RopeTable) -> np.ndarray:
    """Rotate the first n_rot elements of heads x (T, H, D): pairs (i, i + n_rot/2) if neox, else (2i, 2i + 1)."""
    half = table.cos.shape[-1]
    out = x.copy()
    if table.neox:
        first, second = slice(0, half), slice(half, 2 * half)
    else:
        first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    a, b = x[..., first], x[..., second]
    out[..., first] = a * table.cos - b * table.sin
    out[..., second] = a * table.sin + b * table.cos
    return out
