"""The CPU in place of a GPU: the same kernels, compiled with g++ and run as fibers (kernels/emulate.h).

For tests: it is slow, and it is strict. Arguments of launches are checked against the kernels' signatures, and arrays
of the host are refused, which a GPU would only answer with wrong results.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpillama.backends.gpu.cache import cached, user_cache
from mpillama.backends.gpu.device import Array, Unit
from mpillama.backends.gpu.source import assemble
from mpillama.errors import UserError

_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DMPL_EMULATE")
_CODES = {"f": np.float32, "d": np.float64, "i": np.int32, "l": np.int64, "B": np.uint8, "H": np.uint16}
_PARAMETER = re.compile(r"\*?.")


class DeviceArray(np.ndarray):
    """An array that counts as being in a device's memory."""


class EmulatedDevice:
    """Kernels on the CPU, in the calling thread.

    Args:
        warp: lanes of a warp, 32 or 64.
        order: in which the threads of a block take turns: 0 forward, 1 backward, 2 random.
        seed: of the random order.
        sanitize: compile with AddressSanitizer, which must be loaded before Python (LD_PRELOAD).
        folder: for compiled kernels; by default the user's on this node.
        gemm_tokens: see `Device`.

    Raises:
        UserError: there is no g++.
    """

    name = "emulated"
    n_cores = 2

    def __init__(
        self,
        warp: int = 32,
        order: int = 0,
        seed: int = 1,
        sanitize: bool = False,
        folder: Path | None = None,
        gemm_tokens: int = 0,
    ) -> None:
        self._compiler = shutil.which("g++") or ""
        if not self._compiler:
            raise UserError("the emulated device compiles its kernels with g++, which is not on PATH; install g++")
        self.warp, self._order, self._seed, self._sanitize = warp, order, seed, sanitize
        self.gemm_tokens = gemm_tokens
        self._folder = folder or user_cache()
        self._libraries: dict[Unit, ctypes.CDLL] = {}
        self._kernels: dict[tuple[Unit, str], tuple[Any, list[str]]] = {}

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """Return an array of bytes that are no sensible number."""
        out = np.empty(shape, dtype)
        out.reshape(-1).view(np.uint8)[:] = 0xFD
        return out.view(DeviceArray)

    def upload(self, x: np.ndarray) -> DeviceArray:
        """Return a copy."""
        return np.array(x, order="C").view(DeviceArray)

    def download(self, x: Array) -> np.ndarray:
        """Return a copy."""
        return np.array(x, subok=False)

    def free_memory(self) -> int:
        """Return 0: it is the host's."""
        return 0

    def synchronize(self) -> None:
        """Launches have ended when they return."""

    def gemm(self, x: Array, w: Array, out: Array) -> None:
        """Set out = x w^T in float32."""
        x, w = (a.astype(np.uint32) << 16 if a.dtype == np.uint16 else a for a in (x, w))
        x, w = (np.asarray(a.view(np.float32) if a.dtype == np.uint32 else a, np.float32) for a in (x, w))
        np.matmul(x, w.T, out=out)

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, ...], block: int, args: tuple[Any, ...], shared: int = 0
    ) -> None:
        """Run a kernel.

        Raises:
            TypeError: an argument is not what the kernel takes.
            ValueError: a size of the launch is none that a GPU takes.
            RuntimeError: its threads wait for each other.
        """
        grid = (*grid, 1, 1)[:3]
        if min(grid) < 1 or max(grid[1:]) > 65535 or not 0 < block <= 1024 or block % self.warp or shared > 48 << 10:
            raise ValueError(f"{kernel}: grid {grid}, block {block}, {shared} bytes of shared memory")
        function, signature = self._kernel(unit, kernel)
        if len(args) != len(signature):
            raise TypeError(f"{kernel} takes {len(signature)} arguments, not {len(args)}")
        values = [_value(kernel, i, code, arg) for i, (code, arg) in enumerate(zip(signature, args, strict=True))]
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        how = np.array([*grid, block, 1, 1, self._order, self._seed], np.uint32)
        fault = function(ctypes.c_void_p(how.ctypes.data), ctypes.c_size_t(shared), pointers)
        if fault:
            raise RuntimeError(f"{kernel}: {fault.decode()}")

    def _kernel(self, unit: Unit, name: str) -> tuple[Any, list[str]]:
        found = self._kernels.get((unit, name))
        if found is None:
            if unit not in self._libraries:
                self._libraries[unit] = ctypes.CDLL(str(self._compile(unit)))
            library = self._libraries[unit]
            function = library[f"{name}__launch"]
            function.restype = ctypes.c_char_p
            text = ctypes.create_string_buffer(128)
            if library[f"{name}__signature"](text, len(text)):
                raise AssertionError(f"the signature of {name} is too long")
            found = self._kernels[unit, name] = function, _PARAMETER.findall(text.value.decode())
        return found

    def _compile(self, unit: Unit) -> Path:
        flags = [*_FLAGS, f"-DMPL_WARP={self.warp}", *(f"-D{name}={value}" for name, value in unit.defines)]
        if self._sanitize:
            flags += ["-g", "-fsanitize=address"]
        text = assemble(unit, emulated=True)

        def make(path: Path) -> None:
            command = [self._compiler, *flags, "-x", "c++", "-", "-o", str(path)]
            done = subprocess.run(command, input=text, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{unit.file} {unit.defines}: {done.stderr[:4000]}")

        return cached(self._folder, "\n".join([*flags, text]), ".so", make)


def _value(kernel: str, number: int, code: str, arg: Any) -> np.ndarray:
    """Return an argument as memory that holds it.

    Raises:
        TypeError: it is not of the kernel's type.
    """
    if not code.startswith("*"):
        if type(arg) is not _CODES[code]:
            raise TypeError(f"{kernel}: argument {number} is {type(arg).__name__}, not {_CODES[code].__name__}")
        return np.array(arg)
    if arg is None:
        return np.zeros(1, np.uint64)
    if not isinstance(arg, DeviceArray):
        raise TypeError(f"{kernel}: argument {number} is not in device memory")
    if arg.dtype != _CODES[code[1]] or not arg.flags.c_contiguous:
        raise TypeError(f"{kernel}: argument {number} is {arg.dtype} {arg.strides}, not contiguous {code}")
    return np.array(arg.ctypes.data, np.uint64)
