"""Arrays and kernels of one device, behind the protocol of `base.Backend`; nothing here knows of other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mpillama.errors import UsageError

if TYPE_CHECKING:
    from mpillama.backends.base import Backend

NAMES = ("auto", "cpu", "reference", "cuda", "hip", "emulated")
GPU_NAMES = ("cuda", "hip")
"""The names that `make_backend` knows; `GPU_NAMES` are those of real GPUs."""


def make_backend(
    name: str = "auto", n_threads: int = 1, cores: Sequence[int] = (), level: str = "", device: int = 0
) -> Backend:
    """Return a backend of this process.

    Args:
        name: one of `NAMES`; ``auto`` is ``cpu`` where that was built, else ``reference``.
        n_threads: of the process, the calling one included; NumPy's are the caller's to limit.
        cores: that the threads are pinned to, in turn; empty: they are not.
        level: instruction sets of the cpu backend (scalar; avx2, avx512, amx; neon, dotprod, i8mm, sve512);
            empty: the best of this machine.
        device: number of the GPU, among those that the process sees.

    Raises:
        UsageError: there is no such backend or level, or it was not built.
        UserError: there is no such GPU, or something that it needs is missing.
    """
    built = find_spec("mpillama._cpu") is not None
    if name == "auto":
        name = "cpu" if built else "reference"
    if name == "reference":
        from mpillama.backends.reference import ReferenceBackend

        return ReferenceBackend()
    if name in (*GPU_NAMES, "emulated"):
        from mpillama.backends.gpu import make_gpu_backend

        return make_gpu_backend(name, device)
    if name != "cpu":
        raise UsageError(f"there is no backend {name}; choose one of {', '.join(NAMES)}")
    if not built:
        raise UsageError("the cpu backend is not built: install mpillama with pip (which needs a C++ compiler)")
    from mpillama.backends.cpu.backend import CpuBackend

    return CpuBackend(n_threads, cores, level)
