"""What the GPU backend asks of a device: arrays, kernels by name, and products of large matrices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import DTypeLike

Array = Any
"""An array in the device's memory, C-contiguous, with ``shape``, ``dtype``, ``size`` and ``reshape`` as in NumPy.

There is no arithmetic on it, and no part of it but slices: CuPy would compile kernels of its own for the rest, whose
headers not every cluster has installed.
"""


SHARED_BYTES = 48 << 10
"""Shared memory that a block of threads has without asking for more."""
MOST_SHARED_BYTES = 99 << 10
"""What it can ask for on each NVIDIA GPU with matrix units (CUDA C++ Programming Guide, "Technical Specifications per
Compute Capability": 99 KB on 8.6, 8.9 and 12.0, more on others)."""


@dataclass(frozen=True)
class Unit:
    """A kernel file and the macros that it is compiled with."""

    file: str
    defines: tuple[tuple[str, int], ...] = ()


class Graph(Protocol):
    """Work that was recorded, to be started as a whole."""

    def launch(self) -> None:
        """Start it, after all work so far."""
        ...


class Device(Protocol):
    """One GPU, or the CPU in its place.

    Attributes:
        name: as the backend is called.
        warp: lanes of a warp, 32 or 64.
        n_cores: multiprocessors; what a launch should at least fill.
        gemm_tokens: from so many tokens on `gemm` is worth making the weights floats; 0: never.
        matrix_units: it has those of mma.cuh, and products of 9 tokens and more may use them; with warps of 32 also
            attention of prompts.
        async_copies: its kernels copy to shared memory while they compute (``MPL_ASYNC``).
        can_capture: it has `capture`.
    """

    name: str
    warp: int
    n_cores: int
    gemm_tokens: int
    matrix_units: bool
    async_copies: bool
    can_capture: bool

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """Return an array with undefined content."""
        ...

    def upload(self, x: np.ndarray) -> Array:
        """Return a copy of a host array; the host array may change after the call."""
        ...

    def write(self, x: Array, values: np.ndarray) -> None:
        """Overwrite an array, after all work so far; the host array may change after the call."""
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
            shared: bytes of dynamic shared memory, up to SHARED_BYTES; on NVIDIA's with matrix units MOST_SHARED_BYTES.
        """
        ...

    def gemm(self, x: Array, w: Array, out: Array) -> None:
        """Set out (T, n) float32 = x (T, k) w (n, k)^T; x and w are both float32, float16, or bfloat16 as uint16."""
        ...

    def copy(self, target: Array, source: Array) -> None:
        """Copy an array as a whole."""
        ...

    def address(self, x: Array) -> int:
        """Return where an array begins in memory."""
        ...

    def graph_memory(self) -> AbstractContextManager[object]:
        """Let `empty` take memory that recorded work has for itself, and never gives back.

        Work that is to be recorded should run once like this before: then there is memory enough for it, and what it
        uploads once is there. All graphs share this memory, so nothing in it lasts beyond the next launch.
        """
        ...

    def capture(self, work: Callable[[], Array]) -> tuple[Graph, Array]:
        """Record what ``work`` starts, without doing it; returns that, and the array that ``work`` returns.

        Every argument is recorded as it is: only what arrays hold may differ when the graph is launched. ``work`` may
        start kernels and collectives and make arrays, of `graph_memory`; it may not bring anything over or back, nor
        use `gemm`.
        """
        ...

    def free_memory(self) -> int:
        """Return the bytes that are free; 0 where there is no memory of its own."""
        ...

    def synchronize(self) -> None:
        """Wait until all work so far is done."""
        ...
