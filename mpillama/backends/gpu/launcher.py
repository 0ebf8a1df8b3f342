"""What all ops of the GPU backend share."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpillama.backends.gpu.device import Array, Device, Unit

ELEMENTWISE = Unit("elementwise.cu")
_BLOCK = 256


class Launcher:
    """Kernels of one device, for arrays of float32 unless told otherwise."""

    def __init__(self, device: Device) -> None:
        self.device = device

    def elements(self, kernel: str, n_threads: int, *args: Any, unit: Unit = ELEMENTWISE) -> None:
        """Start a kernel with a thread for each element, if there are any."""
        if n_threads:
            self.device.launch(unit, kernel, (-(-n_threads // _BLOCK),), _BLOCK, args)

    def rows(self, kernel: str, n_rows: int, n: int, *args: Any) -> None:
        """Start a kernel with a block for each row of n elements, if there are any."""
        if n_rows:
            block = min(512, max(1, -(-n // (4 * self.device.warp))) * self.device.warp)
            self.device.launch(ELEMENTWISE, kernel, (n_rows,), block, args)


def product(sizes: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    return int(np.prod(sizes, dtype=np.int64))


def int32(x: np.ndarray) -> np.ndarray:
    """Return small host integers as the kernels take them."""
    return np.ascontiguousarray(x, np.int32)


def two_axes(x: Array) -> tuple[int, int]:
    """Return the number of rows, and the elements of each, of an array of any number of axes."""
    n = int(x.shape[-1])
    return product(tuple(x.shape[:-1])), n
