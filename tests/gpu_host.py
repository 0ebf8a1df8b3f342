"""GPU backends for tests that speak NumPy: on the emulated device, and on a real one where there is one."""

from __future__ import annotations

import shutil
from typing import Any

import numpy as np
import pytest

from mpillama.backends.base import AttentionParams, Batch, RawWeight
from mpillama.backends.gpu.backend import GpuBackend
from mpillama.backends.gpu.emulated import DeviceArray, EmulatedDevice

NO_COMPILER = "" if shutil.which("g++") else "the emulated GPU needs g++"
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)

# Warps of both sizes, and every order of threads.
VARIANTS = ((32, 2), (64, 1), (32, 0))


class HostView:
    """A GPU backend whose ops take and return host arrays."""

    def __init__(self, backend: GpuBackend) -> None:
        self.backend = backend

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.backend, name)
        if not callable(method):
            return method

        def call(*args: Any, **kwargs: Any) -> Any:
            # These host arrays stay on the host: integers that the engine makes.
            kept = {"embedding": (0,), "rows": (1,), "rope_table": (0,), "asarray": (0,)}.get(name, ())
            args = tuple(arg if i in kept else self._to_device(arg) for i, arg in enumerate(args))
            return self._to_host(method(*args, **kwargs))

        return call

    def _to_device(self, x: Any) -> Any:
        if isinstance(x, np.ndarray):
            return self.backend.device.upload(x.astype(np.int32) if x.dtype == np.int64 else x)
        return x

    def _to_host(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(self._to_host, x))
        return self.backend.device.download(x) if isinstance(x, DeviceArray) else x


def emulated(warp: int = 32, order: int = 0, seed: int = 1, **options: Any) -> HostView:
    """Return a backend on the emulated device."""
    return HostView(GpuBackend(EmulatedDevice(warp, order, seed, **options)))


__all__ = ["NO_COMPILER", "VARIANTS", "AttentionParams", "Batch", "HostView", "RawWeight", "emulated", "needs_compiler"]
