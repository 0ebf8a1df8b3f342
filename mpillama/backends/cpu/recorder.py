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
from mpillama.backends.cpu.elementwise import ACTIVATIONS, CpuRopeTable
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
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self.complete, self.nbytes = True, 0

    def note(self, result: np.ndarray, call: Callable[..., object], *args: Any) -> np.ndarray:
        """Note the call that has given ``result``, and would give it again in the same place; returns it."""
        # The kernels were given a copy of what is not contiguous.
        if not all(arg.flags.c_contiguous for arg in args if isinstance(arg, np.ndarray)):
            self.complete = False
        self._calls.append((call, args))
        self.nbytes += result.nbytes
        return result

    def play(self) -> None:
        """Make all calls again."""
        for call, args in self._calls:
            call(*args)


class Recorder:
    """Stands for a backend while a step is run, and notes on a tape what is asked of it.

    Only the ops of dense models are noted: results of others depend on more than the arrays that they are given.

    Args:
        backend: does the work.
        tape: has nothing on it yet.
    """

    def __init__(self, backend: CpuBackend, tape: Tape) -> None:
        self._backend, self._pool, self._tape = backend, backend.pool, tape

    def __getattr__(self, name: str) -> Any:
        self._tape.complete = False
        return getattr(self._backend, name)

    def embedding(self, tokens: np.ndarray, w: PackedMatrix, first: int) -> np.ndarray:
        """Note `CpuBackend.embedding`."""
        out, index = self._backend.embedding(tokens, w, first), np.empty(len(tokens), np.int64)
        self._tape.note(index, _subtract, tokens, first, index)
        return self._tape.note(out, _cpu.embedding, self._pool, w.packed, index, out)

    def linear(self, x: np.ndarray, w: PackedMatrix) -> np.ndarray:
        """Note `CpuBackend.linear`."""
        out = self._backend.linear(x, w)
        return self._tape.note(out, _cpu.linear, self._pool, w.packed, x, w.pad, out)

    def linears(self, x: np.ndarray, ws: Sequence[PackedMatrix]) -> list[np.ndarray]:
        """Note `CpuBackend.linears`."""
        if any(w.pad != ws[0].pad or w.packed.n_in != ws[0].packed.n_in for w in ws):
            return [self.linear(x, w) for w in ws]
        outs = self._backend.linears(x, ws)
        self._tape.note(outs[0], _cpu.linears, self._pool, [w.packed for w in ws], x, ws[0].pad, outs)
        self._tape.nbytes += sum(out.nbytes for out in outs[1:])
        return outs

    def gated_linear(self, activation: str, x: np.ndarray, gate: PackedMatrix, up: PackedMatrix) -> np.ndarray:
        """Note `CpuBackend.gated_linear`."""
        if gate.pad != up.pad or gate.packed.n_in != up.packed.n_in:
            return self.gated(activation, self.linear(x, gate), self.linear(x, up))
        out, index = self._backend.gated_linear(activation, x, gate, up), ACTIVATIONS.index(activation)
        call = _cpu.gated_linear
        return self._tape.note(out, call, self._pool, index, gate.packed, up.packed, x, gate.pad, out)

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.add`."""
        out = self._backend.add(a, b)
        return self._tape.note(out, np.add, a, b, out)

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        """Note `CpuBackend.mul`."""
        out = self._backend.mul(a, b)
        return self._tape.note(out, np.multiply, a, np.float32(b) if isinstance(b, float) else b, out)

    def rows(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.rows`."""
        out = self._backend.rows(x, index)
        return self._tape.note(out, _take_rows, x, index, out)

    def rms_norm(self, x: np.ndarray, w: np.ndarray, eps: float) -> np.ndarray:
        """Note `CpuBackend.rms_norm`."""
        if w.size != x.shape[-1]:
            self._tape.complete = False
        out = self._backend.rms_norm(x, w, eps)
        return self._tape.note(out, _cpu.rms_norm, self._pool, x, w, eps, out)

    def gated(self, activation: str, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.gated`."""
        out, index = self._backend.gated(activation, gate, up), ACTIVATIONS.index(activation)
        return self._tape.note(out, _cpu.gated, self._pool, index, gate, up, out)

    def softcap(self, x: np.ndarray, cap: float) -> np.ndarray:
        """Note `CpuBackend.softcap`."""
        out = self._backend.softcap(x, cap)
        return self._tape.note(out, _cpu.softcap, self._pool, x, cap, out)

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: np.ndarray | None) -> CpuRopeTable:
        """Note `CpuBackend.rope_table`."""
        table = self._backend.rope_table(positions, rope, factors)

        def renew() -> None:
            new = self._backend.rope_table(positions, rope, factors)
            table.cos[:], table.sin[:] = new.cos, new.sin

        self._tape.note(table.cos, renew)
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
        return self._tape.note(out, _cpu.attention, *args)


def _subtract(tokens: np.ndarray, first: int, out: np.ndarray) -> None:
    np.subtract(tokens, first, out=out, dtype=np.int64)


def _take_rows(x: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    np.take(x, index, axis=0, out=out)
