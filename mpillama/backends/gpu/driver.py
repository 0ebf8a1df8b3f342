"""What a GPU needs beside this program: CuPy, a driver, the run-time compiler, headers; and what to do without them."""

from __future__ import annotations

import importlib
import warnings
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from mpillama.errors import UsageError, UserError

EXTRAS = {"cuda": "mpillama[cuda12] (or mpillama[cuda13] with a driver for CUDA 13)", "hip": "mpillama[rocm]"}


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees: its number, name, and bytes of memory, free and in all."""

    index: int
    name: str
    free: int
    total: int


def load_cupy(kind: str) -> ModuleType:
    """Import CuPy for ``cuda`` or ``hip`` and make sure that it sees a GPU.

    Raises:
        UsageError: CuPy is missing, or is the one for the other kind.
        UserError: its libraries, the driver or the GPUs are missing.
    """
    try:
        with warnings.catch_warnings():
            # CuPy's hints at several CuPy packages and old drivers, in words of its own.
            warnings.simplefilter("ignore")
            cupy = importlib.import_module("cupy")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "cupy":
            raise
        raise UsageError(
            f"--backend {kind} needs CuPy: pip install '{EXTRAS[kind].split(' ')[0]}'{_or(kind)}"
        ) from None
    except ImportError as error:
        # CuPy frames its message, and has the reason in the middle of it.
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        library = "ROCm 7" if kind == "hip" else "CUDA"
        raise UserError(f"CuPy cannot be loaded ({reason}); load the cluster's {library} module") from None
    if bool(cupy.cuda.runtime.is_hip) != (kind == "hip"):
        raise UsageError(
            f"--backend {kind}, but the installed CuPy is the one for {'CUDA' if kind == 'hip' else 'ROCm'}: pip "
            f"uninstall it, then pip install {EXTRAS[kind]}"
        )
    visible_gpus(cupy)
    return cupy


def _or(kind: str) -> str:
    return " (or 'mpillama[cuda13]' with a driver for CUDA 13)" if kind == "cuda" else ""


def visible_gpus(cupy: Any) -> int:
    """Return how many GPUs this process sees.

    Raises:
        UserError: none, and why.
    """
    runtime = cupy.cuda.runtime
    try:
        count = int(runtime.getDeviceCount())
    except runtime.CUDARuntimeError as error:
        reason = str(error).split(":")[0]
        shown = "ROCm (rocm-smi shows it)" if runtime.is_hip else "CUDA (nvidia-smi shows both)"
        raise UserError(
            f"there is no usable GPU here ({reason}): run on a GPU node, or with another --backend; if this is one, "
            f"its driver may be older than CuPy's {shown}"
        ) from None
    if not count:
        raise UserError("no GPU is visible to this process: ask the scheduler for one (srun --gpus-per-task=1)")
    return count


def list_gpus(kind: str) -> list[Gpu]:
    """Return the GPUs that this process sees.

    Raises:
        UserError: see `load_cupy`.
    """
    cupy = load_cupy(kind)
    found = []
    for index in range(visible_gpus(cupy)):
        with cupy.cuda.Device(index):
            free, total = cupy.cuda.runtime.memGetInfo()
        name = cupy.cuda.runtime.getDeviceProperties(index)["name"]
        found.append(Gpu(index, name.decode() if isinstance(name, bytes) else str(name), int(free), int(total)))
    return found


def compile_failure(kind: str, file: str, error: Exception) -> UserError:
    """Return what to say when the run-time compiler has failed for a kernel file."""
    text = str(error)
    if "Failed to find CUDA headers" in text:
        return UserError("the CUDA headers are missing: pip install nvidia-cuda-runtime (for CUDA 12 -cu12)")
    if "nvrtc" in text.lower() and ("not found" in text.lower() or "No such file" in text or "cannot open" in text):
        return UserError("CUDA's run-time compiler is missing: pip install nvidia-cuda-nvrtc (for CUDA 12 -cu12)")
    if kind == "hip" and "hipcc" in text:
        return UserError("CuPy asks hipcc for the headers, which is not on PATH or fails; load ROCm's module")
    head = next((line for line in text.splitlines() if "error" in line), text[:200])
    return UserError(f"{file} could not be compiled for this GPU ({head.strip()})")


def identify(cupy: Any, index: int) -> str:
    """Return what tells a GPU from the others of its host; parts of one (MIG) have UUIDs of their own."""
    uuid = cupy.cuda.runtime.getDeviceProperties(index).get("uuid")
    return uuid.hex() if isinstance(uuid, bytes) and any(uuid) else str(cupy.cuda.Device(index).pci_bus_id)
