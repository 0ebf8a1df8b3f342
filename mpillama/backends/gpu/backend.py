"""The GPU backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from mpillama.backends.base import Batch, Stepper
from mpillama.backends.gpu.attention import AttentionOps
from mpillama.backends.gpu.device import Array, Device


class GpuBackend(AttentionOps):
    """All ops on one device.

    Products of quantized weights round the activations to 8 bits, a factor for each 32 of them (relative error about
    5e-3); those of 9 tokens and more on matrix units, or of very many tokens by a library, round weights and
    activations to float16 instead (below 1e-3). Products of F32 weights are float32 throughout; attention is in
    `attention.py`.
    """

    host_arrays = False

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.name = device.name

    def stepper(self, ops: Any, work: Callable[[Batch, Array | None], Array], capture: bool) -> Stepper:
        """Return what runs the steps of a model; see `base.Stepping`."""
        from mpillama.backends.gpu.steps import Steps

        return Steps(self, work, capture and ops.capturable)

    def stream_gbps(self, n_threads: int, n_bytes: int = 1 << 30) -> float:
        """Return the 1e9 bytes per second that a copy within the device's memory moves, read and written."""
        # The emulated device has only to come through.
        n_bytes = min(n_bytes, self.free_memory() // 4) or 1 << 20
        source, target = (self.device.empty((n_bytes // 4,)) for _ in range(2))
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < 0.4:
            self.device.synchronize()
            start = time.perf_counter()
            self.device.copy(target, source)
            self.device.synchronize()
            times.append(time.perf_counter() - start)
        return 2 * source.nbytes / median(times) / 1e9

    def free_memory(self) -> int:
        """Return the bytes that are free on the device; 0 if it has no memory of its own."""
        return self.device.free_memory()
