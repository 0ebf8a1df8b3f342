"""What the GPU backend asks of a device: arrays, kernels by name, and products of large matrices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

Array = Any
"""An array in the device's memory, C-contiguous, with ``shape``, ``dtype``, ``size`` and ``reshape`` as in NumPy."""


@dataclass(frozen=True)
class Unit:
    """A kernel file and the macros that it is compiled with."""

    file: str
    defines: tuple[tuple[str, int], ...] = ()


class Device(Protocol):
    """One GPU, or the CPU in its place.

    Attributes:
        name: as the backend is called.
        warp: lanes of a warp, 32 or 64.
        n_cores: multiprocessors; what a launch should at least fill.
        gemm_tokens: from so many tokens on `gemm` is worth making the weights floats; 0: never.
    """

    name: str
    warp: int
    n_cores: int
    gemm_tokens: int

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """Return an array with undefined content."""
        ...

    def upload(self, x: np.ndarray) -> Array:
        """Return a copy of a host array; the host array may change after the call."""
        ...

    def download(self, x: Array) -> np.ndarray:
        """Return a copy on the host, after all work so far."""
        ...

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, ...], block: int, args: tuple[Any, ...], shared: int = 0
    ) -> None:
        """Start a kernel.

        Args:
            unit: where it is.
            kernel: its name.
            grid: up to three sizes, none of them 0.
            block: threads, whole warps.
            args: arrays, None for a null pointer, and NumPy scalars of exactly the types of the parameters.
            shared: bytes of dynamic shared memory.
        """
        ...

    def gemm(self, x: Array, w: Array, out: Array) -> None:
        """Set out (T, n) float32 = x (T, k) w (n, k)^T; x and w are both float32, float16, or bfloat16 as uint16."""
        ...

    def free_memory(self) -> int:
        """Return the bytes that are free; 0 where there is no memory of its own."""
        ...

    def synchronize(self) -> None:
        """Wait until all work so far is done."""
        ...
