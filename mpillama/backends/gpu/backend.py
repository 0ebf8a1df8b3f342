"""The GPU backend."""

from __future__ import annotations

from collections.abc import Callable

from mpillama.backends.base import Batch, Stepper
from mpillama.backends.gpu.attention import AttentionOps
from mpillama.backends.gpu.device import Array, Device


class GpuBackend(AttentionOps):
    """All ops on one device.

    Products of quantized weights round the activations to 8 bits, a factor for each 32 of them (relative error about
    5e-3); with very many tokens, on devices with a library for it, weights and activations are rounded to float16
    instead (about 3e-4). Products of F32 weights are float32 throughout, as is everything else.
    """

    host_arrays = False

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.name = device.name

    def stepper(self, work: Callable[[Batch, Array | None], Array], capture: bool) -> Stepper:
        """Return what runs the steps of a model; see `base.Stepping`."""
        from mpillama.backends.gpu.steps import Steps

        return Steps(self, work, capture)

    def free_memory(self) -> int:
        """Return the bytes that are free on the device; 0 if it has no memory of its own."""
        return self.device.free_memory()
