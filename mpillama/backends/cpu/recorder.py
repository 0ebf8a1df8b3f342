"""What a step asks of the CPU backend, noted so that it can be asked again without the model text.

Between two products the caches hold weights and not the interpreter, so each line of the model text costs several times
what it does alone: about a tenth of a small model's step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillama import _cpu
from mpillama.backends.base import AttentionParams, Batch
from mpillama.backends.cpu.attention import attention_args
from mpillama.backends.cpu.elementwise import ACTIVATIONS, CpuRopeTable, rope_table_args
from mpillama.config import Rope

if TYPE_CHECKING:
    from mpillama.backends.cpu.backend import CpuBackend, PackedMatrix


class Tape:
    """Calls in their order, on arrays that stay where they are.

    Attributes:
        complete: whether everything was noted.
        nbytes: of the results that it keeps.
    """

    def __init__(self) -> None:
        # Kernels that follow each other are called at once.
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._kernels: _cpu.Calls | None = None
        self._kept: list[tuple[Any, ...]] = []
        self.complete, self.nbytes = True, 0

    def note(self, result: np.ndarray, call: Callable[..., object], *args: Any) -> np.ndarray:
        """Note the call that has given ``result``, and would give it again in the same place; returns it."""
        self._kernels = None
        self._calls.append((call, args))
        return self._added(result, args)

    def kernel(self, result: np.ndarray, name: str, *args: Any) -> np.ndarray:
        """Note the call of a kernel, see `note`."""
        getattr(self._native(), name)(*args)
        self._kept.append(args)
        return self._added(result, args)

    def foreign(self, result: np.ndarray, call: Any) -> np.ndarray:
        """Note the call of another extension module, ``call.capsule``; see `note`."""
        self._native().foreign(call.capsule)
        self._kept.append((call,))
        return self._added(result, ())

    def _native(self) -> _cpu.Calls:
        if self._kernels is None:
            self._kernels = _cpu.Calls()
            self._calls.append((self._kernels.play, ()))
        return self._kernels

    def play(self) -> None:
        """Make all calls again."""
        for call, args in self._calls:
            call(*args)

    def _added(self, result: np.ndarray, args: tuple[Any, ...]) -> np.ndarray:
        # The kernels were given a copy of what is not contiguous.
        if not all(arg.flags.c_contiguous for arg in args if isinstance(arg, np.ndarray)):
            self.complete = False
        self.nbytes += result.nbytes
        return result


class Recorder:
    """Stands for a backend while a step is run, and notes on a tape what is asked of it.

    Only ops whose results depend on nothing but the arrays that they are given are noted.

    Args:
        backend: does the work.
        tape: has nothing on it yet.
    """

    def __init__(self, backend: CpuBackend, tape: Tape) -> None:
        self._backend, self._pool, self._tape = backend, backend.pool, tape
        # Experts and weights as the router has left them.
        self._routes: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        self._tape.complete = False
        return getattr(self._backend, name)

    def embedding(self, tokens: np.ndarray, w: PackedMatrix, first: int) -> np.ndarray:
        """Note `CpuBackend.embedding`."""
        out, index = self._backend.embedding(tokens, w, first), np.empty(len(tokens), np.int64)
        self._tape.note(index, _subtract, tokens, first, index)
        return self._tape.kernel(out, "embedding", self._pool, w.packed, index, out)

    def linear(self, x: np.ndarray, w: PackedMatrix) -> np.ndarray:
        """Note `CpuBackend.linear`."""
        out = self._backend.linear(x, w)
        return self._tape.kernel(out, "linear", self._pool, w.packed, x, w.pad, out)

    def linears(self, x: np.ndarray, ws: Sequence[PackedMatrix]) -> list[np.ndarray]:
        """Note `CpuBackend.linears`."""
        if any(w.pad != ws[0].pad or w.packed.n_in != ws[0].packed.n_in for w in ws):
            return [self.linear(x, w) for w in ws]
        outs = self._backend.linears(x, ws)
        self._tape.kernel(outs[0], "linears", self._pool, [w.packed for w in ws], x, ws[0].pad, outs)
        self._tape.nbytes += sum(out.nbytes for out in outs[1:])
        return outs

    def gated_linear(self, activation: str, x: np.ndarray, gate: PackedMatrix, up: PackedMatrix) -> np.ndarray:
        """Note `CpuBackend.gated_linear`."""
        if gate.pad != up.pad or gate.packed.n_in != up.packed.n_in:
            return self.gated(activation, self.linear(x, gate), self.linear(x, up))
        out, index = self._backend.gated_linear(activation, x, gate, up), ACTIVATIONS.index(activation)
        return self._tape.kernel(out, "gated_linear", self._pool, index, gate.packed, up.packed, x, gate.pad, out)

    def route(self, logits: np.ndarray, n_used: int, gating: str, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
        """Note `CpuBackend.route`."""
        experts, weights = self._backend.route(logits, n_used, gating, normalize)
        self._tape.kernel(weights, "route", self._pool, logits, gating == "softmax", normalize, experts, weights)
        self._routes += experts, weights
        return experts, weights

    def expert_linear(self, x: np.ndarray, w: PackedMatrix, experts: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.expert_linear`."""
        self._check_route(experts)
        out = self._backend.expert_linear(x, w, experts)
        return self._tape.kernel(out, "expert_linear", self._pool, w.packed, x, w.pad, experts, out)

    def sum_experts(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.sum_experts`."""
        self._check_route(weights)
        out = self._backend.sum_experts(x, weights)
        return self._tape.kernel(out, "sum_experts", self._pool, x, weights, out)

    def take(self, rows: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.take`."""
        self._check_route(index)
        out = self._backend.take(rows, index)
        return self._tape.note(out, _take_rows, rows, index, out)

    def _check_route(self, array: np.ndarray) -> None:
        """See that it is the router's own: what was made of that elsewhere is not on the tape."""
        if not any(array is known for known in self._routes):
            self._tape.complete = False

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.add`."""
        out = self._backend.add(a, b)
        if a.shape == b.shape:
            return self._tape.kernel(out, "add", self._pool, a, b, out)
        return self._tape.note(out, np.add, a, b, out)

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        """Note `CpuBackend.mul`."""
        out = self._backend.mul(a, b)
        if isinstance(b, float):
            return self._tape.kernel(out, "scale", self._pool, a, b, out)
        return self._tape.note(out, np.multiply, a, b, out)

    def rows(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.rows`."""
        out = self._backend.rows(x, index)
        return self._tape.note(out, _take_rows, x, index, out)

    def rms_norm(self, x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
        """Note `CpuBackend.rms_norm`."""
        if w.size != x.shape[-1]:
            self._tape.complete = False
        out = self._backend.rms_norm(x, w, eps)
        return self._tape.kernel(out, "rms_norm", self._pool, x, w, eps, out)

    def gated(self, activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.gated`."""
        out, index = self._backend.gated(activation, gate, up), ACTIVATIONS.index(activation)
        return self._tape.kernel(out, "gated", self._pool, index, gate, up, out)

    def sigmoid(self, x: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.sigmoid`."""
        out = self._backend.sigmoid(x)
        return self._tape.kernel(out, "sigmoid", self._pool, x, out)

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        """Note `CpuBackend.softcap`."""
        out = self._backend.softcap(x, cap)
        return self._tape.kernel(out, "softcap", self._pool, x, cap, out)

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: np.ndarray | None) -> CpuRopeTable:
        """Note `CpuBackend.rope_table`."""
        table = self._backend.rope_table(positions, rope, factors)
        args = rope_table_args(self._pool, positions, rope, factors, table)
        self._tape.kernel(table.cos, "rope_table", *args)
        return table

    def attention(
        self,
        q: np.ndarray,
        k: np.ndarray,
        v: np.ndarray,
        cache: Any,
        batch: Batch,
        params: AttentionParams,
        sinks: np.ndarray | None,
        rope: CpuRopeTable | None = None,
    ) -> np.ndarray:
        """Note `CpuBackend.attention`."""
        out = self._backend.attention(q, k, v, cache, batch, params, sinks, rope)
        args = attention_args(self._pool, q, k, v, cache, batch, params, sinks, rope, out)
        return self._tape.kernel(out, "attention", *args)


def _subtract(tokens: np.ndarray, first: int, out: np.ndarray) -> None:
    np.subtract(tokens, first, out=out, dtype=np.int64)


def _take_rows(x: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    np.take(x, index, axis=0, out=out)
