"""The GPU backend: one kernel source for CUDA, HIP and, to be proven without a GPU, the CPU."""

from __future__ import annotations

from mpillama.backends.gpu.backend import GpuBackend
from mpillama.backends.gpu.device import Device


def make_gpu_backend(name: str, index: int = 0) -> GpuBackend:
    """Return a backend on GPU ``index`` of this process; ``name`` is ``cuda``, ``hip`` or ``emulated``.

    Raises:
        UserError: there is no such GPU, or something that it needs is missing.
    """
    device: Device
    if name == "emulated":
        from mpillama.backends.gpu.emulated import EmulatedDevice

        device = EmulatedDevice()
    else:
        from mpillama.backends.gpu.cupy_device import CupyDevice

        device = CupyDevice(name, index)
    return GpuBackend(device)
