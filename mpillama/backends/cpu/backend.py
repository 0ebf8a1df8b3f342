"""The CPU backend: products with packed weights in C++, and the other ops with those of its neighbours here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpillama import _cpu
from mpillama.backends.base import Handle, RawWeight, Stepper
from mpillama.backends.cpu.attention import AttentionOps
from mpillama.backends.cpu.buffers import Buffers
from mpillama.backends.cpu.codebooks import codebook
from mpillama.backends.cpu.elementwise import ACTIVATIONS, ElementwiseOps
from mpillama.backends.cpu.steps import CpuSteps, Recording, Work
from mpillama.errors import UsageError
from mpillama.gguf.types import GGMLType

PACKED = frozenset(GGMLType(number) for number in _cpu.packed_types())
"""The types that weights can have."""


@dataclass(frozen=True)
class PackedMatrix:
    """A stack of matrices in panels of 16 rows, and how many of its columns lie before the rank's own."""

    packed: _cpu.PackedWeight
    pad: int

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.packed.nbytes


class CpuBackend(AttentionOps, ElementwiseOps):
    """Kernels on a pool of threads.

    Products of quantized weights with few tokens round the activations to 8 bits (a factor for each 32 of them,
    relative error about 5e-3); with many tokens on AMX, weights and activations are rounded to bfloat16 (about
    2.4e-3). Products of F32 weights, and of F16 and BF16 weights without AMX, are float32 throughout.

    What an op makes of its arguments it leaves to ``kernels`` altogether, or altogether to NumPy; see `recorder`.

    Args:
        n_threads: the calling thread included.
        cores: thread i is pinned to ``cores[i % len(cores)]``; empty: nothing is pinned.
        level: instruction sets to use, one of `_cpu.levels()`; empty: the best that there is.

    Raises:
        UsageError: the machine does not have this level.
    """

    name = "cpu"

    def __init__(self, n_threads: int = 1, cores: Sequence[int] = (), level: str = "") -> None:
        super().__init__()
        self.kernels = _cpu
        self.buffers = Buffers()
        try:
            self.pool = _cpu.Pool(n_threads, list(cores), level)
        except ValueError as error:
            raise UsageError(f"{error}") from None

    def kernel_ns(self) -> int:
        """Return the nanoseconds spent in kernels so far, as their caller sees it."""
        return self.pool.busy_ns

    def stepper(self, ops: Recording, work: Work, capture: bool) -> Stepper:
        """Return what runs steps; see `Stepping`."""
        return CpuSteps(self, ops, work) if capture and ops.alike else lambda batch, residual: work(batch, residual)

    def supports(self, type: GGMLType) -> bool:
        """Whether weights of this type can be used."""
        return type in PACKED

    def weight(self, raw: RawWeight) -> Handle:
        """Pack the slice; its bytes are not kept."""
        n_mats, n_rows, row_bytes = raw.raw.shape
        w = self.new_weight(raw.type, n_mats, n_rows, raw.n_in, raw.pad)
        self.fill(w, 0, np.ascontiguousarray(raw.raw).reshape(n_mats * n_rows, row_bytes))
        return w

    def new_weight(self, type: GGMLType, n_mats: int, n_rows: int, n_in: int, pad: tuple[int, int]) -> PackedMatrix:
        """Return a weight for `fill`; see `mpillama.backends.base.Filling`."""
        return PackedMatrix(_cpu.PackedWeight(int(type), n_mats, n_rows, n_in, codebook(type)), pad[0])

    def fill(self, w: PackedMatrix, first: int, rows: np.ndarray) -> None:
        """Pack rows of a weight."""
        _cpu.pack(self.pool, w.packed, first, rows)

    def embedding(self, tokens: np.ndarray, w: PackedMatrix, first: int) -> np.ndarray:  # type: ignore[override]
        """Return rows of the embedding, zeros for those that are elsewhere."""
        out = self.buffers.empty((len(tokens), w.packed.n_in))
        self.kernels.embedding(self.pool, w.packed, tokens, first, out)
        return out

    def linear(self, x: np.ndarray, w: PackedMatrix) -> np.ndarray:  # type: ignore[override]
        """Return x W^T."""
        out = self.buffers.empty((x.shape[0], w.packed.n_rows))
        self.kernels.linear(self.pool, w.packed, x, w.pad, out)
        return out

    def linears(self, x: np.ndarray, ws: Sequence[PackedMatrix]) -> list[np.ndarray]:
        """Return x W^T for each of several matrices."""
        if any(w.pad != ws[0].pad or w.packed.n_in != ws[0].packed.n_in for w in ws):
            return [self.linear(x, w) for w in ws]
        n_tokens = x.shape[0]
        outs = [self.buffers.empty((n_tokens, w.packed.n_rows)) for w in ws]
        self.kernels.linears(self.pool, [w.packed for w in ws], x, ws[0].pad, outs)
        return outs

    def gated_linear(self, activation: str, x: np.ndarray, gate: PackedMatrix, up: PackedMatrix) -> np.ndarray:
        """Return act(x G^T) * (x U^T)."""
        if gate.pad != up.pad or gate.packed.n_in != up.packed.n_in:
            return self.gated(activation, self.linear(x, gate), self.linear(x, up))
        out = self.buffers.empty((x.shape[0], gate.packed.n_rows))
        index = ACTIVATIONS.index(activation)
        self.kernels.gated_linear(self.pool, index, gate.packed, up.packed, x, gate.pad, out)
        return out

    def expert_linear(self, x: np.ndarray, w: PackedMatrix, experts: np.ndarray) -> np.ndarray:  # type: ignore[override]
        """Multiply each token by the matrices of its experts."""
        if (experts < 0).any():
            # The kernel takes no gaps: a token for each expert that is here.
            at = np.nonzero(experts >= 0)
            out = np.zeros((*experts.shape, w.packed.n_rows), np.float32)
            if len(at[0]):
                out[at] = self.expert_linear(x[at] if x.ndim == 3 else x[at[0]], w, experts[at][:, None])[:, 0]
            return out
        out = self.buffers.empty((*experts.shape, w.packed.n_rows))
        self.kernels.expert_linear(self.pool, w.packed, x, w.pad, experts, out)
        return out

    def stream_gbps(self, n_threads: int, n_bytes: int) -> float:
        """Return how fast all threads together read memory, in 1e9 bytes/s; ``n_threads`` is what the pool has."""
        return _cpu.stream_gbps(self.pool, n_bytes, 0.4)
