"""A stand-in for CuPy, as far as `CupyDevice` uses it, on the CPU.

Kernels are compiled with g++ from the text and options that a GPU's compiler would get. It proves that calls have the
shape that CuPy documents, not that a GPU understands them.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import subprocess
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np

import mpillama.backends.gpu as package
from mpillama.backends.gpu.cache import cached, user_cache

KERNELS = Path(package.__file__).parent / "kernels"


class Stream:
    """A stream that does all work at once, unless it records: then kernels wait for the launch of a graph."""

    ptr, current = 1, None

    def __init__(self, non_blocking):
        # A blocking one could not be recorded.
        assert non_blocking
        self.recorded = None

    def use(self):
        Stream.current = self

    def synchronize(self):
        assert self.recorded is None

    def begin_capture(self):
        self.recorded = []

    def end_capture(self):
        work, self.recorded = self.recorded, None
        return Graph(work)

    def do(self, work):
        if self.recorded is None:
            work()
        else:
            self.recorded.append(work)


class Graph:
    def __init__(self, work):
        self.work = work

    def launch(self, stream=None):
        assert stream.recorded is None
        for work in self.work:
            work()


class Memory:
    def __init__(self, size):
        self.buffer = bytearray(size)


class MemoryPool:
    """Memory by the size, of which nothing is in use any more that nobody has a reference to."""

    def __init__(self, allocator):
        self._allocator, self._used, self._free = allocator, [], {}

    def malloc(self, size):
        # What only this list and the loop know is free.
        for entry in list(self._used):
            pointer, known = entry
            if known() is None:
                self._used.remove(entry)
                self._free.setdefault(len(pointer.memory.buffer), []).append(pointer)
        if self._free.get(size):
            return self._free[size].pop()
        assert Stream.current.recorded is None, "memory is asked for while work is being recorded"
        return self._allocator(size)

    def use(self, pointer, array):
        self._used.append((pointer, weakref.ref(array)))


class DefaultPool:
    def malloc(self, size):
        raise AssertionError("only a name for the usual memory")


class MemoryPointer:
    def __init__(self, memory, offset):
        assert offset == 0
        self.memory = memory


class Allocators:
    """The allocator of each thread."""

    def __init__(self):
        self._local = threading.local()

    @contextlib.contextmanager
    def using(self, malloc):
        before, self._local.pool = self.current, malloc.__self__
        yield
        self._local.pool = before

    @property
    def current(self):
        return getattr(self._local, "pool", None)

    def empty(self, shape, dtype):
        pool, n_bytes = self.current, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        if pool is None or isinstance(pool, DefaultPool) or not n_bytes:
            assert not n_bytes or Stream.current.recorded is None
            return np.empty(shape, dtype).view(Array)
        # As CuPy, in units of 512 bytes.
        pointer = pool.malloc(-(-n_bytes // 512) * 512)
        root = np.frombuffer(pointer.memory.buffer, np.uint8, n_bytes).view(Array)
        root[:] = 0xFD
        pool.use(pointer, root)
        return root.view(dtype).reshape(shape)


class Pointer:
    """Device memory: an address that can be moved."""

    def __init__(self, ptr: int) -> None:
        self.ptr = ptr

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.ptr + offset)

    def copy_from_host_async(self, memory, size, stream):
        assert isinstance(memory, ctypes.c_void_p)
        assert stream.recorded is None
        ctypes.memmove(self.ptr, memory, size)


class Array(np.ndarray):
    """An array with CuPy's ``data``."""

    @property
    def data(self):
        return Pointer(self.ctypes.data)


class Pinned(bytearray):
    @property
    def ptr(self):
        return ctypes.addressof(ctypes.c_char.from_buffer(self))


class Event:
    def __init__(self, block=False, disable_timing=False):
        self.recorded = False

    def record(self, stream):
        self.recorded = True

    def synchronize(self):
        pass


class CUDARuntimeError(RuntimeError):
    pass


class RawModule:
    def __init__(self, *, code, options):
        self.code, self.options = code, options

    def get_function(self, name):
        warp = re.search(r"#define MPL_WARP (\d+)", self.code)[1]
        flags = [*self.options, f"-DMPL_WARP={warp}", "-DMPL_EMULATE", "-O1", "-fPIC", "-shared", "-U_FORTIFY_SOURCE"]

        def make(path):
            command = ["g++", *flags, "-include", str(KERNELS / "emulate.h"), "-x", "c++", "-", "-o", str(path)]
            subprocess.run(command, input=self.code, text=True, check=True)

        emulator = (KERNELS / "emulate.h").read_text()
        library = ctypes.CDLL(str(cached(user_cache(), "\n".join([*flags, emulator, self.code]), ".so", make)))
        function = library[f"{name}__launch"]
        function.restype = ctypes.c_char_p

        def call(grid, block, args, *, shared_mem=0):
            assert len(grid) == len(block) == 3
            assert shared_mem <= call.max_dynamic_shared_size_bytes
            values = []
            for arg in args:
                # As CuPy, which takes arrays by address and NumPy's scalars by their bytes.
                assert isinstance(arg, (Array, np.generic)), type(arg)
                values.append(np.array(arg.ctypes.data, np.uint64) if isinstance(arg, Array) else np.array(arg))
            pointers = (ctypes.c_void_p * len(values))(*[value.ctypes.data for value in values])
            how = np.array([*grid, *block, 0, 0], np.uint32)

            # Pointers are all that a graph keeps; `values` is the memory of the arguments themselves.
            def run(values=values):
                fault = function(ctypes.c_void_p(how.ctypes.data), ctypes.c_size_t(shared_mem), pointers)
                assert fault is None, fault

            Stream.current.do(run)

        call.max_dynamic_shared_size_bytes = 48 << 10
        return call


def _at(ptr, rows, cols, type):
    dtype = np.dtype(np.float32 if type == 0 else np.float16)
    buffer = (ctypes.c_char * (rows * cols * dtype.itemsize)).from_address(ptr)
    return np.frombuffer(buffer, dtype).reshape(rows, cols)


def gemm_ex(handle, ta, tb, m, n, k, one, a, ta_, lda, b, tb_, ldb, zero, c, tc, ldc, compute, algo):
    """Column-major C (m, n) = A^T B, as cuBLAS documents it; CuPy refuses it while work is being recorded."""
    assert Stream.current.recorded is None
    assert (ta, tb, lda, ldb, ldc, tc, compute) == (1, 0, k, k, m, 0, 68)
    left, right = _at(a, m, k, ta_).astype(np.float32), _at(b, n, k, tb_).astype(np.float32)
    _at(c, n, m, tc)[:] = right @ left.T


CUBLAS = SimpleNamespace(
    gemmEx=gemm_ex,
    getPointerMode=lambda handle: 1,
    setPointerMode=lambda handle, mode: None,
    CUBLAS_POINTER_MODE_HOST=0,
    CUBLAS_OP_N=0,
    CUBLAS_OP_T=1,
    CUBLAS_COMPUTE_32F=68,
    CUBLAS_GEMM_DEFAULT=-1,
)


class Device:
    def __init__(self, index):
        self.index = index
        self.compute_capability = "90"
        self.pci_bus_id = f"0000:0{index}:00.0"

    def use(self):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def fake_cupy(
    n_gpus: int = 2, hip: bool = False, error: str = "", arch: bytes = b"gfx90a:sramecc+:xnack-"
) -> SimpleNamespace:
    """Return a module that sees so many GPUs, or none because of ``error``."""

    def count():
        if error:
            raise CUDARuntimeError(error)
        return n_gpus

    def download(x, stream=None, out=None):
        assert stream.recorded is None
        assert type(out) is np.ndarray
        assert (out.shape, out.dtype) == (x.shape, x.dtype)
        out[...] = x
        return out

    def properties(index):
        found = {"name": b"Fake GPU", "multiProcessorCount": 4, "warpSize": 64 if hip else 32}
        return found | ({"gcnArchName": arch} if hip else {"uuid": bytes([index + 1] * 16)})

    allocators = Allocators()
    runtime = SimpleNamespace(
        is_hip=hip,
        getDeviceCount=count,
        CUDARuntimeError=CUDARuntimeError,
        memGetInfo=lambda: (8 << 30, 16 << 30),
        getDeviceProperties=properties,
        CUDA_R_32F=0,
        CUDA_R_16F=2,
        CUDA_R_16BF=14,
    )
    cuda = SimpleNamespace(
        runtime=runtime,
        Device=Device,
        Stream=Stream,
        get_current_stream=lambda: Stream.current,
        MemoryPool=MemoryPool,
        using_allocator=allocators.using,
        Event=Event,
        alloc_pinned_memory=Pinned,
        device=SimpleNamespace(get_cublas_handle=lambda: 7),
        compiler=SimpleNamespace(CompileException=type("CompileException", (Exception,), {})),
        memory=SimpleNamespace(
            OutOfMemoryError=type("OutOfMemoryError", (MemoryError,), {}), Memory=Memory, MemoryPointer=MemoryPointer
        ),
    )
    return SimpleNamespace(
        cuda=cuda,
        RawModule=RawModule,
        empty=allocators.empty,
        get_default_memory_pool=DefaultPool,
        asnumpy=download,
    )
