"""GPU backends for tests that speak NumPy: on the emulated device, or on the GPU that ``MPILLAMA_TEST_GPU`` asks for.

``MPILLAMA_TEST_GPU=cuda`` (or ``hip``) takes a real GPU; `run_gpu.py` sets it. With
``MPILLAMA_TEST_GPU_POOL=0`` each array is an allocation of its own, so that a tool that watches accesses knows where it
ends. With ``MPILLAMA_TEST_GPU_GRAPHS=1`` steps are recorded on ROCm too, which `emulated_cupy.py` can do.
"""

from __future__ import annotations

import os
import shutil
import zlib
from typing import Any

import numpy as np
import pytest

from mpillama.backends import make_backend
from mpillama.backends.base import AttentionParams, Batch, RawWeight
from mpillama.backends.gpu.backend import GpuBackend
from mpillama.backends.gpu.emulated import EmulatedDevice

SEED = "MPILLAMA_TEST_SEED"
REAL = os.environ.get("MPILLAMA_TEST_GPU", "")
NO_COMPILER = "" if REAL or shutil.which("g++") else "the emulated GPU needs g++"
needs_compiler = pytest.mark.skipif(bool(NO_COMPILER), reason=NO_COMPILER)
only_emulated = pytest.mark.skipif(bool(REAL), reason="this is about the emulated GPU")

# Warps of both sizes, and every order of threads.
VARIANTS = ((32, 2), (64, 1), (32, 0))
EVERY_VARIANT = tuple((warp, order) for warp in (32, 64) for order in range(3))


def variant_of(name: str, rng: np.random.Generator) -> tuple[int, int]:
    """Return a warp and an order; in a session, the warp is one for each name.

    Compiling takes longest, so few types are compiled for the larger warps too: others in each session.
    """
    number = zlib.crc32(f"{os.environ[SEED]} {name}".encode())
    return (64 if number % 4 == 0 else 32), int(rng.integers(3))


def gpu_backend(
    warp: int = 32, order: int = 0, seed: int = 1, gemm_tokens: int = 0, matrix_units: bool = False, **options: Any
) -> GpuBackend:
    """Return a backend; a real GPU has the warp and the order that it has.

    Without ``gemm_tokens`` and ``matrix_units`` nothing but weights and cache is rounded to float16.
    """
    if not REAL:
        options |= {"gemm_tokens": gemm_tokens, "matrix_units": matrix_units}
        return GpuBackend(EmulatedDevice(warp, order, seed, **options))
    backend = make_backend(REAL)
    assert isinstance(backend, GpuBackend)
    if os.environ.get("MPILLAMA_TEST_GPU_POOL") == "0":
        import cupy

        cupy.cuda.set_allocator(None)
    # Without a library there is no use in asking for it.
    backend.device.gemm_tokens = gemm_tokens if backend.device.gemm_tokens else 0
    backend.device.matrix_units &= matrix_units
    backend.device.can_capture |= os.environ.get("MPILLAMA_TEST_GPU_GRAPHS") == "1"
    return backend


def skip_without(what: str, there: bool) -> None:
    """Skip a test where a real GPU lacks what it is about."""
    if REAL and not there:
        pytest.skip(f"this GPU has no {what}")


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
            kept = {
                "embedding": (0,),
                "rows": (1,),
                "rope_table": (0,),
                "asarray": (0,),
                "attn_temperature": (0,),
                "copy_blocks": (1,),
                "read_blocks": (1,),
                "write_blocks": (1, 2, 3),
            }.get(name, ())
            args = tuple(arg if i in kept else self._to_device(arg) for i, arg in enumerate(args))
            return self._to_host(method(*args, **kwargs))

        return call

    def _to_device(self, x: Any) -> Any:
        if type(x) is np.ndarray:
            return self.backend.device.upload(x.astype(np.int32) if x.dtype == np.int64 else x)
        return x

    def _to_host(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(self._to_host, x))
        on_device = hasattr(x, "dtype") and hasattr(x, "shape") and type(x) is not np.ndarray
        return self.backend.device.download(x) if on_device else x


def emulated(warp: int = 32, order: int = 0, seed: int = 1, **options: Any) -> HostView:
    """Return a backend on the emulated device, or on the real one in its place."""
    return HostView(gpu_backend(warp, order, seed, **options))


def kernels_of(backend: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the kernels that will be started."""
    seen: list[str] = []
    launch = backend.device.launch

    def counted(unit: Any, kernel: str, *args: Any, **options: Any) -> None:
        seen.append(kernel)
        launch(unit, kernel, *args, **options)

    monkeypatch.setattr(backend.device, "launch", counted)
    return seen


__all__ = [
    "EVERY_VARIANT",
    "NO_COMPILER",
    "REAL",
    "VARIANTS",
    "AttentionParams",
    "Batch",
    "HostView",
    "RawWeight",
    "emulated",
    "gpu_backend",
    "kernels_of",
    "needs_compiler",
    "only_emulated",
    "skip_without",
    "variant_of",
]
