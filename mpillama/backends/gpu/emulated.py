"""The CPU in place of a GPU: the same kernels, compiled with g++ and run as fibers (kernels/emulate.h).

For tests: it is slow, and it is strict. Arguments of launches are checked against the kernels' signatures, and arrays
of the host are refused, which a GPU would only answer with wrong results.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpillama.backends.gpu.cache import cached, user_cache
from mpillama.backends.gpu.device import MOST_SHARED_BYTES, SHARED_BYTES, Array, Unit
from mpillama.backends.gpu.source import assemble
from mpillama.errors import UserError

_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DMPL_EMULATE")
_CODES = {"f": np.float32, "d": np.float64, "i": np.int32, "l": np.int64, "B": np.uint8, "H": np.uint16}
_PARAMETER = re.compile(r"\*?.")


class DeviceArray(np.ndarray):
    """An array that counts as being in a device's memory: for kernels only, see `device.Array`."""

    def __array_ufunc__(self, ufunc: np.ufunc, *_: Any, **__: Any) -> Any:
        raise TypeError(f"{ufunc.__name__} on a device's array")

    def __getitem__(self, key: Any) -> Any:
        parts = key if isinstance(key, tuple) else (key,)
        if not all(part is Ellipsis or isinstance(part, (slice, int)) for part in parts):
            raise TypeError("a selection from a device's array")
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        raise TypeError("an assignment to a device's array")

    def astype(self, *_: Any, **__: Any) -> Any:
        """Refuse; see the class.

        Raises:
            TypeError: always.
        """
        raise TypeError("another type of a device's array")


def _plain(x: DeviceArray) -> np.ndarray:
    return x.view(np.ndarray)


class EmulatedGraph:
    """Work in order, and the arrays that it is done in."""

    def __init__(self, work: list[Callable[[], object]], arrays: list[DeviceArray]) -> None:
        self._work, self._arrays = work, arrays

    def launch(self) -> None:
        """Do it. Arrays do not keep what was in them: other graphs may have been there."""
        for array in self._arrays:
            _spoil(array)
        for work in self._work:
            work()


def _spoil(array: DeviceArray) -> None:
    _plain(array).reshape(-1).view(np.uint8)[:] = 0xFD


class EmulatedDevice:
    """Kernels on the CPU, in the calling thread.

    Args:
        warp: lanes of a warp, 32 or 64.
        order: in which the threads of a block take turns: 0 forward, 1 backward, 2 random.
        seed: of the random order.
        sanitize: compile with AddressSanitizer, which must be loaded before Python (LD_PRELOAD).
        folder: for compiled kernels; by default the user's on this node.
        gemm_tokens: see `Device`.
        matrix_units: see `Device`.

    Raises:
        UserError: there is no g++.
    """

    name = "emulated"
    n_cores = 2
    can_capture = True

    def __init__(
        self,
        warp: int = 32,
        order: int = 0,
        seed: int = 1,
        sanitize: bool = False,
        folder: Path | None = None,
        gemm_tokens: int = 0,
        matrix_units: bool = False,
    ) -> None:
        self._compiler = shutil.which("g++") or ""
        if not self._compiler:
            raise UserError("the emulated device compiles its kernels with g++, which is not on PATH; install g++")
        self.warp, self._order, self._seed, self._sanitize = warp, order, seed, sanitize
        self.gemm_tokens, self.matrix_units, self.async_copies = gemm_tokens, matrix_units, warp == 32
        self._folder = folder or user_cache()
        self._libraries: dict[Unit, ctypes.CDLL] = {}
        self._kernels: dict[tuple[Unit, str], tuple[Any, list[str]]] = {}
        self._recorded: list[Callable[[], object]] | None = None
        self._made: list[DeviceArray] = []

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> DeviceArray:
        """Return an array of bytes that are no sensible number."""
        out = np.empty(shape, dtype).view(DeviceArray)
        _spoil(out)
        if self._recorded is not None:
            self._made.append(out)
        return out

    def upload(self, x: np.ndarray) -> DeviceArray:
        """Return a copy."""
        self._not_while_recording("upload")
        return np.array(x, order="C").view(DeviceArray)

    def write(self, x: Array, values: np.ndarray) -> None:
        """Overwrite an array."""
        self._not_while_recording("write")
        _plain(x)[...] = values

    def download(self, x: Array) -> np.ndarray:
        """Return a copy."""
        self._not_while_recording("download")
        return np.array(x, subok=False)

    def copy(self, target: Array, source: Array) -> None:
        """Copy an array as a whole."""
        self.enqueue(partial(np.copyto, _plain(target), _plain(source)))

    def address(self, x: Array) -> int:
        """Return where an array begins in memory."""
        return int(x.ctypes.data)

    def graph_memory(self) -> AbstractContextManager[object]:
        """Return a context without effect: every array has memory of its own."""
        return nullcontext()

    def capture(self, work: Callable[[], Array]) -> tuple[EmulatedGraph, Array]:
        """Record launches, with the numbers and addresses that they have now."""
        self._not_while_recording("capture")
        self._recorded, self._made = [], []
        try:
            result = work()
            return EmulatedGraph(self._recorded, self._made), result
        finally:
            self._recorded, self._made = None, []

    def enqueue(self, work: Callable[[], object]) -> None:
        """Do something, or record it."""
        if self._recorded is None:
            work()
        else:
            self._recorded.append(work)

    def _not_while_recording(self, what: str) -> None:
        """Raise what a GPU would.

        Raises:
            RuntimeError: work is being recorded.
        """
        if self._recorded is not None:
            raise RuntimeError(f"{what} while work is being recorded")

    def free_memory(self) -> int:
        """Return 0: it is the host's."""
        return 0

    def synchronize(self) -> None:
        """Launches have ended when they return."""

    def gemm(self, x: Array, w: Array, out: Array) -> None:
        """Set out = x w^T in float32."""
        self._not_while_recording("gemm")
        x, w = (a.astype(np.uint32) << 16 if a.dtype == np.uint16 else a for a in map(_plain, (x, w)))
        x, w = (np.asarray(a.view(np.float32) if a.dtype == np.uint32 else a, np.float32) for a in (x, w))
        np.matmul(x, w.T, out=_plain(out))

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
        room = MOST_SHARED_BYTES if self.matrix_units and self.warp == 32 else SHARED_BYTES
        if min(grid) < 1 or max(grid[1:]) > 65535 or not 0 < block <= 1024 or block % self.warp or shared > room:
            raise ValueError(f"{kernel}: grid {grid}, block {block}, {shared} bytes of shared memory")
        function, signature = self._kernel(unit, kernel)
        if len(args) != len(signature):
            raise TypeError(f"{kernel} takes {len(signature)} arguments, not {len(args)}")
        values = [_value(kernel, i, code, arg) for i, (code, arg) in enumerate(zip(signature, args, strict=True))]
        pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
        how = np.array([*grid, block, 1, 1, self._order, self._seed], np.uint32)

        def run(keep: object = (values, args)) -> None:
            fault = function(ctypes.c_void_p(how.ctypes.data), ctypes.c_size_t(shared), pointers)
            if fault:
                raise RuntimeError(f"{kernel}: {fault.decode()}")

        self.enqueue(run)

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
        flags = [*_FLAGS]
        if self._sanitize:
            flags += ["-g", "-fsanitize=address"]
        text = assemble(unit, self.warp, emulated=True)

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
    # CuPy has no memory for what is empty.
    return np.array(arg.ctypes.data if arg.size else 0, np.uint64)
