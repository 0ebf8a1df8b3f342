"""The small ops of the GPU backend: sums, norms, rotations, activations, choosing experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import RawWeight
from mpillama.backends.gpu.device import Array, Device, Unit
from mpillama.backends.gpu.inputs import StepInputs
from mpillama.backends.gpu.launcher import ELEMENTWISE, Launcher, int32, product, two_axes
from mpillama.backends.gpu.rounded import Rounded, RoundedArrays
from mpillama.backends.quants import dequantize
from mpillama.backends.rope import frequencies
from mpillama.config import Rope

EXPERTS = Unit("experts.cu")
# The most tokens of matvec.cuh, in which each weight is read once.
MATVEC_TOKENS = 8
# For the widest rows of 8 bits, one for each 32 numbers; splits of attention need fewer.
_COUNTERS = 1 << 14
# Values that a block of threads sorts at a time.
_TOP_CHUNK = 2048
TOP_K = Unit("top_k.cu", (("TOP_CHUNK", _TOP_CHUNK),))
ACTIVATIONS = {"silu": 0, "gelu": 1, "swiglu_oai": 2}
# Shorter rows have a warp each.
_LONG_ROW = 1024
# Threads of a block, and the most fours of a row that one of them has in add_norm.
_THREADS, _MOST_FOURS = 1024, 4


@dataclass(frozen=True)
class GpuRopeTable:
    """Rotations of a step's tokens: cos and sin (T, n_rot / 2), magnitude included."""

    cos: Array
    sin: Array
    neox: bool


class ElementwiseOps:
    """The ops of `Backend` that look at each element, row or head by itself.

    Attributes:
        inputs: what is on the device of the batch of this step.
        rounded: activations in 8 bits. Norms and activation functions leave them there, so that products of few tokens
            need not wait for another kernel.
        halved: activations in float16, for products of many tokens.
        counters: zeros, by which blocks of threads find out who is the last.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.run = Launcher(device)
        self._frequencies: dict[tuple[Rope, int], tuple[Array, Array | None]] = {}
        self.inputs: StepInputs | None = None
        self.rounded, self.halved = RoundedArrays(device), RoundedArrays(device)
        self.counters = device.upload(np.zeros(_COUNTERS, np.int32))

    def vector(self, raw: RawWeight) -> Array:
        """Return float32 (rows, n)."""
        return self.device.upload(dequantize(raw.raw[0], raw.type))

    def asarray(self, x: np.ndarray) -> Array:
        """Bring a small array over."""
        return self.device.upload(np.asarray(x, np.float32))

    def to_host(self, x: Array) -> np.ndarray:
        """Return a host array."""
        return self.device.download(x)

    def upload_index(self, x: np.ndarray) -> Array:
        """Return integers of the step's batch where they are on the device, or bring others over."""
        known = self.inputs.find(x) if self.inputs is not None else None
        return self.device.upload(int32(x)) if known is None else known

    def take(self, table: Array, index: Array) -> Array:
        """Return ``table[index]``."""
        n = product(tuple(table.shape[1:]))
        out = self.device.empty((*index.shape, *table.shape[1:]))
        self.run.elements("gather_rows", out.size, table, index, np.int32(n), np.int64(out.size), out)
        return out

    def add_taken(self, x: Array, table: Array, index: Array) -> Array:
        """Return x + table[index], and x where the index is negative."""
        out = self.device.empty(tuple(x.shape))
        size = np.int64(out.size)
        self.run.elements("add_rows", out.size, x, table, index, np.int32(x.shape[-1]), size, out)
        return out

    def join(self, parts: Sequence[Array]) -> Array:
        """Return float32 arrays of as many rows joined along the last axis."""
        n = sum(int(part.shape[-1]) for part in parts)
        out, start = self.device.empty((*parts[0].shape[:-1], n)), 0
        for part in parts:
            width = int(part.shape[-1])
            size = np.int64(part.size)
            self.run.elements("put_columns", part.size, part, np.int32(width), np.int32(start), np.int32(n), size, out)
            start += width
        return out

    def narrow(self, x: Array, bf16: bool) -> Array:
        """Return float32 numbers rounded to bfloat16, or to float16, as uint16."""
        out = self.device.empty(tuple(x.shape), np.uint16)
        self.run.elements("narrow", x.size, x, np.int32(bf16), np.int64(x.size), out)
        return out

    def widen(self, x: Array, bf16: bool, out: Array) -> None:
        """Write what `narrow` has made into a float32 array."""
        self.run.elements("widen", out.size, x, np.int32(bf16), np.int64(out.size), out)

    def move_rows(self, source: Array, rows: Array | None, target: Array, places: Array | None) -> None:
        """Copy rows of bytes, whole pieces of 16, of one array to places in another; None: the first, in order."""
        n = product(tuple(target.shape[1:])) // 16
        index = rows if rows is not None else places
        size = n * (int(index.size) if index is not None else int(source.shape[0]))
        self.run.elements("move_rows", size, source, rows, target, places, np.int32(n), np.int64(size))

    def rows(self, x: Array, index: np.ndarray) -> Array:
        """Return these rows."""
        return self.take(x, self.upload_index(index))

    def add(self, a: Array, b: Array) -> Array:
        """Return a + b."""
        return self._binary(0, a, b)

    def mul(self, a: Array, b: Array | float) -> Array:
        """Return a * b."""
        return self._unary(0, a, b) if isinstance(b, float) else self._binary(1, a, b)

    def sigmoid(self, x: Array) -> Array:
        """Return 1 / (1 + exp(-x))."""
        return self._unary(1, x)

    def softcap(self, x: Array, cap: float) -> Array:
        """Return cap * tanh(x / cap)."""
        return self._unary(2, x, cap)

    def gated(self, activation: str, gate: Array, up: Array, biases: tuple[Array, Array, Array] | None = None) -> Array:
        """Return act(gate) * up; see `Joining.gated`."""
        out = self.device.empty(tuple(gate.shape))
        op = np.int32(ACTIVATIONS[activation])
        if self._is_rounded(out):
            n_fours, n = out.size // 4, int(out.shape[-1])
            args = op, gate, up, *(biases or (None, None, None)), np.int32(n // 4), np.int64(n_fours), out
            self.run.elements("gated_rounded", n_fours, *args, *self.new_rounded(out, n))
        else:
            if biases:
                gate, up = (self.add_taken(x, bias, biases[2]) for x, bias in zip((gate, up), biases, strict=False))
            self.run.elements("gated", out.size, op, gate, up, out, np.int64(out.size))
        return out

    def _is_rounded(self, x: Array) -> bool:
        """Whether to leave an activation in 8 bits too: its rows are whole sub-blocks, and its tokens few enough."""
        few = not self.half_tokens or x.shape[0] < self.half_tokens
        return bool(few and x.shape[-1] % 32 == 0)

    @property
    def half_tokens(self) -> int:
        """From so many tokens on products of quantized weights take activations in float16; 0: never."""
        return MATVEC_TOKENS + 1 if self.device.matrix_units else self.device.gemm_tokens

    def new_rounded(self, x: Array, n_in: int, pad: int = 0) -> Rounded:
        """Return arrays for activations in 8 bits, which the caller fills."""
        n_units = x.size // max(1, int(x.shape[-1])) * (n_in // 32)
        empty = self.device.empty
        arrays = empty((n_units, 8), np.int32), empty((n_units,)), empty((n_units, 2))
        return self.rounded.keep(x, n_in, pad, arrays)

    def sum_experts(self, x: Array, weights: Array) -> Array:
        """Return the weighted sum over the chosen experts."""
        n_tokens, n_used, n = x.shape
        out = self.device.empty((n_tokens, n))
        sizes = np.int32(n_used), np.int32(n), np.int64(out.size)
        self.run.elements("sum_experts", out.size, x, weights, *sizes, out)
        return out

    def _unary(self, op: int, x: Array, number: float = 0.0) -> Array:
        out = self.device.empty(tuple(x.shape))
        self.run.elements("unary", out.size, np.int32(op), x, np.float32(number), out, np.int64(out.size))
        return out

    def _binary(self, op: int, a: Array, b: Array) -> Array:
        shape = np.broadcast_shapes(tuple(a.shape), tuple(b.shape))
        out = self.device.empty(shape)
        _, n1, n2 = (1, 1, 1, *shape)[-3:]
        steps = [np.int64(step) for x in (a, b) for step in _steps(tuple(x.shape), shape)]
        size = np.int64(out.size)
        self.run.elements("binary", out.size, np.int32(op), a, b, out, size, np.int32(n1), np.int32(n2), *steps)
        return out

    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        """Return the RMS norm."""
        n_rows, n = two_axes(x)
        # More axes are heads, which no product takes.
        if x.ndim == 2 and _fits_block(n) and (n > _LONG_ROW or self._is_rounded(x)):
            return self.add_norm(None, x, w, eps)[1]
        out = self.device.empty(tuple(x.shape))
        if n <= _LONG_ROW:
            count = np.int32(n), np.int64(n_rows)
            self.run.elements("rms_norm_short", n_rows * self.device.warp, x, w, np.float32(eps), *count, out)
        else:
            self.run.rows("rms_norm_long", n_rows, n, x, w, np.float32(eps), np.int32(n), out)
        return out

    def add_norm(
        self,
        h: Array | None,
        x: Array,
        w: Array,
        eps: float,
        post: Array | None = None,
        factor: float = 1.0,
        weights: Array | None = None,
        bias: Array | None = None,
        index: Array | None = None,
    ) -> tuple[Array, Array]:
        """Add to the residual; returns that and its norm; see `Joining.add_norm`.

        Without h, only the norm is there, of rows that fit into a block of threads.
        """
        n_rows, n = int(x.shape[0]), int(x.shape[-1])
        if h is not None and not _fits_block(n):
            if bias is not None:
                x = self.add(x, bias) if index is None else self.add_taken(x, bias, index)
            x = x if weights is None else self.sum_experts(x, weights)
            x = x if post is None else self.rms_norm(x, post, eps)
            h = self.add(h, x if factor == 1.0 else self.mul(x, factor))
            return h, self.rms_norm(h, w, eps)
        out = self.device.empty((n_rows, n))
        total = out if h is None else self.device.empty((n_rows, n))
        rounded = self.new_rounded(out, n) if self._is_rounded(out) else (None, None, None)
        each = next(each for each in (1, 2, _MOST_FOURS) if n <= 4 * each * _THREADS)
        block = -(-n // (4 * each * self.device.warp)) * self.device.warp
        n_used = np.int32(0 if weights is None else weights.shape[1])
        args = h, x, bias, index, weights, n_used, post, np.float32(factor), w, np.float32(eps), np.int32(n)
        if out.size:
            results = (None if h is None else total), out, *rounded
            self.device.launch(ELEMENTWISE, f"add_norm_{each}", (n_rows,), block, (*args, *results))
        return total, out

    def sum_squares(self, x: Array, start: int, stop: int) -> Array:
        """Return the sum of squares of a range."""
        n_rows, n = two_axes(x)
        out = self.device.empty((*x.shape[:-1], 1))
        self.run.rows("sum_squares", n_rows, stop - start, x, np.int32(n), np.int32(start), np.int32(stop), out)
        return out

    def scale_by_mean_square(self, x: Array, mean_square: Array, w: Array, eps: float) -> Array:
        """Return x / sqrt(mean_square + eps) * w."""
        out = self.device.empty(tuple(x.shape))
        sizes = np.int32(x.shape[-1]), np.int64(out.size)
        self.run.elements("scale_by_mean_square", out.size, x, mean_square, w, np.float32(eps), *sizes, out)
        return out

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: Array | None) -> GpuRopeTable:
        """Return cosines and sines of the step's tokens."""
        key = rope, id(factors)
        if key not in self._frequencies:
            divisors = None if factors is None else self.device.download(factors)
            # The factors are kept, so that no other array can get their id.
            self._frequencies[key] = self.device.upload(frequencies(rope, divisors)), factors
        n_tokens, half = len(positions), rope.n_rot // 2
        cos, sin = self.device.empty((n_tokens, half)), self.device.empty((n_tokens, half))
        args = np.float32(rope.attn_factor), np.int32(half), np.int64(cos.size), cos, sin
        place = self.upload_index(positions)
        self.run.elements("rope_table", cos.size, place, self._frequencies[key][0], *args)
        return GpuRopeTable(cos, sin, rope.neox)

    def attn_temperature(self, positions: np.ndarray, span: float, scale: float) -> Array:
        """Return the factors on queries, (T, 1)."""
        out = self.device.empty((len(positions), 1))
        numbers = np.float64(span), np.float64(scale), np.int64(out.size)
        self.run.elements("attn_temperature", out.size, self.upload_index(positions), *numbers, out)
        return out

    def rope(self, x: Array, table: GpuRopeTable) -> Array:
        """Rotate heads."""
        out = self.device.empty(tuple(x.shape))
        n_tokens, n_head, n_dim = x.shape
        half = int(table.cos.shape[1])
        size = n_tokens * n_head * (n_dim - half)
        sizes = np.int32(half), np.int32(n_dim), np.int32(n_head), np.int64(size)
        self.run.elements("rope", size, x, table.cos, table.sin, np.int32(table.neox), *sizes, out)
        return out

    def route(
        self, logits: Array, n_used: int, gating: str, normalize: bool, bias: Array | None = None
    ) -> tuple[Array, Array]:
        """Choose the ``n_used`` likeliest experts of each token; among equals the first."""
        n_tokens, n_expert = logits.shape
        experts, weights = self.device.empty((n_tokens, n_used), np.int32), self.device.empty((n_tokens, n_used))
        sizes = np.int32(n_expert), np.int32(n_used), np.int32(gating == "softmax"), np.int32(normalize)
        args = (logits, bias, *sizes, experts, weights)
        if n_tokens:
            whole_warps = -(-n_expert // self.device.warp) * self.device.warp
            block, shared = min(256, whole_warps), 4 * (whole_warps + n_used + 32)
            self.device.launch(EXPERTS, "route", (n_tokens,), block, args, shared)
        return experts, weights

    def held(self, index: Array, start: int, stop: int) -> Array:
        """Return index - start, or -1 outside of start to stop."""
        out = self.device.empty(tuple(index.shape), np.int32)
        self.run.elements("held", out.size, index, np.int32(start), np.int32(stop), np.int64(out.size), out)
        return out

    def as_numbers(self, index: Array) -> Array:
        """Return indices as float32."""
        out = self.device.empty(tuple(index.shape))
        self.run.elements("to_float", out.size, index, np.int64(out.size), out)
        return out

    def as_index(self, x: Array) -> Array:
        """Return them as indices again."""
        out = self.device.empty(tuple(x.shape), np.int32)
        self.run.elements("to_int", out.size, x, np.int64(out.size), out)
        return out

    def top_k(self, x: Array, k: int, first: int) -> Array:
        """Return the largest of each row and their columns."""
        return self._sort_chunks(x, x.shape[1], k, first, merge=False)

    def merge_top_k(self, x: Array, k: int) -> Array:
        """Return the largest of several results of `top_k`."""
        return self._sort_chunks(x, x.shape[1] // 2, k, 0, merge=True)

    def _sort_chunks(self, x: Array, n: int, k: int, first: int, merge: bool) -> Array:
        """Leave the k largest of every chunk, until they are one chunk."""
        n_rows = x.shape[0]
        while True:
            n_chunks = max(1, -(-n // _TOP_CHUNK))
            out = self.device.empty((n_rows, n_chunks * 2 * k))
            if n_rows:
                sizes = np.int32(n), np.int32(k), np.int32(first), np.int32(merge)
                self.device.launch(TOP_K, "top_k", (n_chunks, n_rows), 256, (x, *sizes, out), shared=8 * _TOP_CHUNK)
            if n_chunks == 1:
                return out
            x, n, merge = out, n_chunks * k, True


def _fits_block(n: int) -> bool:
    """Whether a block of threads can hold a row."""
    return n % 4 == 0 and n <= 4 * _MOST_FOURS * _THREADS


def _steps(shape: tuple[int, ...], out: tuple[int, ...]) -> list[int]:
    """Return the elements between neighbours along each of three axes, 0 where an axis is repeated.

    Raises:
        ValueError: there are more than three axes.
    """
    if len(out) > 3:
        raise ValueError(f"{len(out)} axes")
    sizes = (1, 1, 1, *shape)[-3:]
    return [0 if size == 1 else product(sizes[axis + 1 :]) for axis, size in enumerate(sizes)]
