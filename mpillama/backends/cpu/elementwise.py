"""The small ops of the CPU backend: norms, rotations, activations, routing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mpillama import _cpu
from mpillama.backends.cpu.buffers import Buffers
from mpillama.backends.reference import ReferenceBackend
from mpillama.backends.rope import frequencies
from mpillama.config import Rope

ACTIVATIONS = ("silu", "gelu", "swiglu_oai")
"""In the order of the native kernels."""


@dataclass(frozen=True)
class CpuRopeTable:
    """Rotations of a step's tokens: float32 (T, n_rot), the factors of each element and, with its sign, its partner."""

    cos: np.ndarray
    sin: np.ndarray
    neox: bool


class ElementwiseOps(ReferenceBackend):
    """The ops of `Backend` that look at each element, row or head by itself, on a pool of threads."""

    pool: _cpu.Pool
    kernels: Any
    buffers: Buffers

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return a + b."""
        if a.size < b.size:
            a, b = b, a
        if not _repeats(a, b):
            return a + b
        out = self.buffers.empty(a.shape)
        self.kernels.add(self.pool, a, b, out)
        return out

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        """Return a * b."""
        if not isinstance(b, float) and not _repeats(a, b):
            return super().mul(a, b)
        out = self.buffers.empty(a.shape)
        if isinstance(b, float):
            self.kernels.scale(self.pool, a, b, out)
        else:
            self.kernels.mul(self.pool, a, b, out)
        return out

    def sum_experts(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Return the weighted sum over the chosen experts."""
        out = self.buffers.empty((x.shape[0], x.shape[2]))
        self.kernels.sum_experts(self.pool, x, weights, out)
        return out

    def rms_norm(self, x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
        """Return the RMS norm."""
        if w.size != x.shape[-1]:
            return super().rms_norm(x, w, eps)
        out = self.buffers.empty(x.shape)
        self.kernels.rms_norm(self.pool, x, w, eps, out)
        return out

    def gated(self, activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Return act(gate) * up."""
        out = self.buffers.empty(gate.shape)
        self.kernels.gated(self.pool, ACTIVATIONS.index(activation), gate, up, out)
        return out

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        """Return 1 / (1 + exp(-x))."""
        out = self.buffers.empty(x.shape)
        self.kernels.sigmoid(self.pool, x, out)
        return out

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        """Return cap * tanh(x / cap)."""
        out = self.buffers.empty(x.shape)
        self.kernels.softcap(self.pool, x, cap, out)
        return out

    def route(self, logits: np.ndarray, n_used: int, gating: str, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
        """Choose the ``n_used`` likeliest experts of each token; among equals the first."""
        experts = np.empty((logits.shape[0], n_used), np.int64)
        weights = np.empty(experts.shape, np.float32)
        self.kernels.route(self.pool, logits, gating == "softmax", normalize, experts, weights)
        return experts, weights

    def top_k(self, x: np.ndarray, k: int, first: int) -> np.ndarray:
        """Return the largest of each row and their columns."""
        out = self.buffers.empty((x.shape[0], 2 * k))
        self.kernels.top_k(self.pool, x, first, out)
        return out

    def merge_top_k(self, x: np.ndarray, k: int) -> np.ndarray:
        """Return the largest of several results of `top_k`."""
        out = self.buffers.empty((x.shape[0], 2 * k))
        self.kernels.merge_top_k(self.pool, x, out)
        return out

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: np.ndarray | None) -> CpuRopeTable:  # type: ignore[override]
        """Return cosines and sines of the step's tokens."""
        cos, sin = np.empty((2, len(positions), rope.n_rot), np.float32)
        theta = frequencies(rope, factors)
        self.kernels.rope_table(self.pool, positions, theta, rope.attn_factor, rope.neox, cos, sin)
        return CpuRopeTable(cos, sin, rope.neox)

    def rope(self, x: np.ndarray, table: CpuRopeTable) -> np.ndarray:  # type: ignore[override]
        """Rotate heads."""
        out = self.buffers.empty(x.shape)
        self.kernels.rope(self.pool, x, table.cos, table.sin, table.neox, out)
        return out


def _repeats(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether b, repeated along the first axes, fits a without a change of its shape."""
    shape = b.shape
    while shape and shape[0] == 1:
        shape = shape[1:]
    return len(b.shape) <= len(a.shape) and shape == a.shape[len(a.shape) - len(shape) :]
