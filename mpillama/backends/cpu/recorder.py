"""What a step asks of the CPU backend, noted so that it can be asked again without the model text.

Between two products the caches hold weights and not the interpreter, so each line of the model text costs several times
what it does alone: about a tenth of a small model's step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillama import _cpu
from mpillama.backends.cpu.buffers import Buffers

if TYPE_CHECKING:
    from mpillama.backends.cpu.backend import CpuBackend, PackedMatrix


class Tape:
    """Calls in their order, on arrays that stay where they are.

    Attributes:
        complete: whether everything was noted.
    """

    def __init__(self) -> None:
        # Kernels that follow each other are called at once.
        self._calls: list[tuple[Callable[..., object], tuple[Any, ...]]] = []
        self._kernels: _cpu.Calls | None = None
        self._kept: list[tuple[Any, ...]] = []
        self._arrays: dict[int, np.ndarray] = {}
        self.complete = True

    @property
    def n_calls(self) -> int:
        """Calls that were noted so far."""
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays that the calls work on, weights not counted."""
        return sum(array.nbytes for array in self._arrays.values())

    def note(self, result: np.ndarray, call: Callable[..., object], *args: Any) -> np.ndarray:
        """Note the call that has given ``result``, and would give it again in the same place; returns it."""
        self._kernels = None
        self._calls.append((call, args))
        self._keep(args)
        return result

    def kernel(self, name: str, *args: Any) -> None:
        """Note the call of a kernel, which fills some of its arguments."""
        getattr(self._native(), name)(*args)
        self._keep(args)

    def foreign(self, result: np.ndarray, call: Any) -> np.ndarray:
        """Note the call of another extension module, ``call.capsule``; see `note`."""
        self._native().foreign(call.capsule)
        self._keep((call,))
        return result

    def play(self) -> None:
        """Make all calls again."""
        for call, args in self._calls:
            call(*args)

    def _native(self) -> _cpu.Calls:
        if self._kernels is None:
            self._kernels = _cpu.Calls()
            self._calls.append((self._kernels.play, ()))
        return self._kernels

    def _keep(self, args: tuple[Any, ...]) -> None:
        self._kept.append(args)
        for arg in args:
            for array in arg if isinstance(arg, list) else (arg,):
                if isinstance(array, np.ndarray):
                    self._arrays[id(array)] = array
                    # The kernel was given a copy of what is not contiguous.
                    self.complete &= array.flags.c_contiguous


class _NotedKernels:
    """The kernels, each of which is noted when it is called."""

    def __init__(self, tape: Tape) -> None:
        self._tape = tape

    def __getattr__(self, name: str) -> Callable[..., None]:
        kernel = getattr(_cpu, name)

        def call(*args: Any) -> None:
            kernel(*args)
            self._tape.kernel(name, *args)

        return call


class Recorder:
    """Stands for a backend while a step is run, and notes on a tape what is asked of it.

    The kernels that an op of the backend calls are noted as they are. Ops by NumPy come here or are not known; then the
    tape is not complete, nor is it where the input of an op is not that of the op before.

    Args:
        backend: does the work.
        tape: has nothing on it yet.
    """

    def __init__(self, backend: CpuBackend, tape: Tape) -> None:
        self._backend, self._tape = copy.copy(backend), tape
        self._backend.kernels = _NotedKernels(tape)
        # What is on a tape is not given back as long as that is kept.
        self._backend.buffers = Buffers()
        # Experts and weights as the router has left them.
        self._routes: list[np.ndarray] = []

    def __getattr__(self, name: str) -> Any:
        op = getattr(self._backend, name)
        if not callable(op):
            return op

        def noted(*args: Any) -> Any:
            before = self._tape.n_calls
            result = op(*args)
            if self._tape.n_calls == before:
                self._tape.complete = False
            return result

        return noted

    def add(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.add`."""
        return self._kernel_or(np.add, self._backend.add, a, b)

    def mul(self, a: np.ndarray, b: np.ndarray | float) -> np.ndarray:
        """Note `CpuBackend.mul`."""
        return self._kernel_or(np.multiply, self._backend.mul, a, b)

    def _kernel_or(self, plain: np.ufunc, op: Callable[..., np.ndarray], a: np.ndarray, b: Any) -> np.ndarray:
        before = self._tape.n_calls
        out = op(a, b)
        return out if self._tape.n_calls > before else self._tape.note(out, plain, a, b, out)

    def rows(self, x: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.rows`."""
        out = self._backend.rows(x, index)
        return self._tape.note(out, _take, x, index, out)

    def take(self, table: np.ndarray, index: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.take`."""
        self._check_route(index)
        return self.rows(table, index)

    def route(self, logits: np.ndarray, n_used: int, gating: str, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
        """Note `CpuBackend.route`."""
        self._routes += self._backend.route(logits, n_used, gating, normalize)
        return self._routes[-2], self._routes[-1]

    def expert_linear(self, x: np.ndarray, w: PackedMatrix, experts: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.expert_linear`."""
        self._check_route(experts)
        return self._backend.expert_linear(x, w, experts)

    def sum_experts(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Note `CpuBackend.sum_experts`."""
        self._check_route(weights)
        return self._backend.sum_experts(x, weights)

    def _check_route(self, array: np.ndarray) -> None:
        """See that it is the router's own: what was made of that elsewhere is not on the tape."""
        if not any(array is known for known in self._routes):
            self._tape.complete = False


def _take(x: np.ndarray, index: np.ndarray, out: np.ndarray) -> None:
    np.take(x, index, axis=0, out=out)
