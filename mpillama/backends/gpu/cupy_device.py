"""A GPU through CuPy: CUDA or ROCm. Written to CuPy's documentation; it has not met a GPU yet (docs/gpu.md)."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from mpillama.backends.gpu.cache import alone, user_cache
from mpillama.backends.gpu.device import SHARED_BYTES, Array, Unit
from mpillama.backends.gpu.driver import compile_failure, load_cupy, visible_gpus
from mpillama.backends.gpu.source import assemble
from mpillama.errors import UserError

# Weights go over in pieces of this size, through two pinned buffers: one is filled while the other is sent.
_PIECE = 16 << 20
# From so many tokens on it should cost less to make all weights floats once than to decode them for each tile: with
# matrix units, and without. By count of bytes and instructions; not measured yet.
_GEMM_TOKENS, _GEMM_TOKENS_PLAIN = 256, 128
# Both makers' number for it, for which CuPy has no name.
_NO_MEMORY = 2
# AMD's GPUs that mma.cuh is made for: CDNA from 2 on.
_MATRIX_ARCHS = frozenset({"gfx90a", "gfx940", "gfx941", "gfx942", "gfx950"})
# Those that rocBLAS comes with kernels for; on others it ends the process.
_BLAS_ARCHS = frozenset({"gfx908", "gfx90a", "gfx942", "gfx950", "gfx1030", "gfx1100", "gfx1101", "gfx1200", "gfx1201"})


class CupyGraph:
    """What a stream has recorded."""

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph, self._stream = graph, stream

    def launch(self) -> None:
        """Start it on its stream."""
        self._graph.launch(self._stream)


class CupyDevice:
    """One GPU. Several, and several of one GPU, can be in a process; each is for one thread at a time.

    Args:
        kind: ``cuda`` or ``hip``.
        index: among the GPUs that this process sees.

    Attributes:
        model: what decides about the last bits of its results, and about what its steps are made of.

    Raises:
        UserError: something that it needs is missing; see `driver`.
    """

    def __init__(self, kind: str, index: int = 0) -> None:
        self._cupy: Any = load_cupy(kind)
        cuda = self._cupy.cuda
        count = visible_gpus(self._cupy)
        if not 0 <= index < count:
            raise UserError(f"GPU {index} was chosen, but this process sees {count}; see --list-devices")
        self.name, self.index = kind, index
        device = cuda.Device(index)
        device.use()
        # Not `device.attributes`, which asks ROCm by numbers that it has changed.
        properties = cuda.runtime.getDeviceProperties(index)
        self.warp, self.n_cores = int(properties["warpSize"]), int(properties["multiProcessorCount"])
        # Like gfx90a:sramecc+:xnack-.
        arch = f"sm_{device.compute_capability}" if kind == "cuda" else properties["gcnArchName"].decode().split(":")[0]
        self.async_copies = kind == "cuda" and int(device.compute_capability) >= 80
        self.matrix_units = self.async_copies or arch in _MATRIX_ARCHS
        self._device, self._stream = device, cuda.Stream(non_blocking=True)
        self._stream.use()
        self._modules: dict[Unit, Any] = {}
        self._kernels: dict[tuple[Unit, str], Any] = {}
        self._pinned: list[tuple[Any, Any]] = []
        self._blas: Any = self._load_blas() if kind == "cuda" or arch in _BLAS_ARCHS else None
        least = _GEMM_TOKENS if self.matrix_units else _GEMM_TOKENS_PLAIN
        self.gemm_tokens = least if self._blas is not None else 0
        self.model = f"{properties['name'].decode()} {arch}, {self.n_cores} cores, gemm from {self.gemm_tokens}"
        # CuPy records nothing on ROCm.
        self.can_capture = kind == "cuda"
        self._graph_chunks: list[Any] = []
        self._graph_pool: Any = None
        self._in_graph_memory = False

    def _load_blas(self) -> Any:
        """Return CuPy's module for cuBLAS or hipBLAS, or None; kernels.matmul then serves long prompts, more slowly."""
        try:
            from cupy_backends.cuda.libs import cublas
        except (ImportError, RuntimeError):
            return None
        return cublas

    def _enter(self) -> None:
        """Make this the GPU and the stream of this thread, which may have used others."""
        if self._cupy.cuda.get_current_stream() is not self._stream:
            self._device.use()
            self._stream.use()

    def empty(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Array:
        """Return an array of the pool."""
        self._enter()
        try:
            return self._cupy.empty(shape, dtype)
        except self._cupy.cuda.memory.OutOfMemoryError:
            free, total = self._cupy.cuda.runtime.memGetInfo()
            raise UserError(
                f"GPU {self.index} is out of memory ({free / 1e9:.1f} of {total / 1e9:.1f} GB are free): use more "
                "ranks, a smaller quantization, or a smaller -c"
            ) from None

    def upload(self, x: np.ndarray) -> Array:
        """Return a copy."""
        with self._lasting_memory():
            out = self.empty(x.shape, x.dtype)
        self._send(np.ascontiguousarray(x), out)
        return out

    def write(self, x: Array, values: np.ndarray) -> None:
        """Overwrite an array."""
        self._enter()
        self._send(np.ascontiguousarray(values, x.dtype), x)

    def _send(self, source: np.ndarray, target: Array) -> None:
        """Copy by way of pinned memory of our own: others may have their bytes read after this has returned."""
        if not source.nbytes:
            return
        if not self._pinned:
            cuda = self._cupy.cuda
            self._pinned = [(cuda.alloc_pinned_memory(_PIECE), cuda.Event(disable_timing=True)) for _ in range(2)]
        source = source.reshape(-1).view(np.uint8)
        for start in range(0, source.size, _PIECE):
            memory, sent = self._pinned[0]
            self._pinned.reverse()
            sent.synchronize()
            piece = source[start : start + _PIECE]
            np.frombuffer(memory, np.uint8, piece.size)[:] = piece
            (target.data + start).copy_from_host_async(ctypes.c_void_p(memory.ptr), piece.size, self._stream)
            sent.record(self._stream)

    def download(self, x: Array) -> np.ndarray:
        """Return a copy on the host, after all work so far."""
        if not x.size:
            return np.empty(x.shape, x.dtype)
        self._enter()
        # Straight into pinned memory, of CuPy's pool: the logits of a large vocabulary come at the speed of the bus.
        memory = self._cupy.cuda.alloc_pinned_memory(x.nbytes)
        out = np.frombuffer(memory, x.dtype, x.size).reshape(x.shape)
        self._cupy.asnumpy(x, stream=self._stream, out=out)
        return out

    def copy(self, target: Array, source: Array) -> None:
        """Copy an array as a whole."""
        self._enter()
        target.data.copy_from_device_async(source.data, source.nbytes, self._stream)

    def address(self, x: Array) -> int:
        """Return where an array begins in memory."""
        return int(x.data.ptr)

    def _lasting_memory(self) -> AbstractContextManager[object]:
        """Use the usual pool: in that of graphs, one may overwrite what another needs from launch to launch."""
        if not self._in_graph_memory:
            return nullcontext()
        usual: AbstractContextManager[object] = self._cupy.cuda.using_allocator(
            self._cupy.get_default_memory_pool().malloc
        )
        return usual

    @contextmanager
    def graph_memory(self) -> Iterator[None]:
        """Use a pool of its own. It keeps its chunks when it thinks that they are free: graphs have their addresses."""
        memory, runtime = self._cupy.cuda.memory, self._cupy.cuda.runtime
        if self._graph_pool is None:

            def allocate(size: int) -> Any:
                try:
                    chunk = memory.Memory(size)
                except runtime.CUDARuntimeError as error:
                    if error.status != _NO_MEMORY:
                        raise
                    # The usual pool keeps what it has once had, of long prompts much.
                    self._cupy.get_default_memory_pool().free_all_blocks()
                    chunk = memory.Memory(size)
                self._graph_chunks.append(chunk)
                return memory.MemoryPointer(chunk, 0)

            self._graph_pool = self._cupy.cuda.MemoryPool(allocate)
        self._in_graph_memory = True
        try:
            with self._cupy.cuda.using_allocator(self._graph_pool.malloc):
                yield
        finally:
            self._in_graph_memory = False

    def capture(self, work: Callable[[], Array]) -> tuple[CupyGraph, Array]:
        """Record the stream."""
        self._enter()
        with self.graph_memory():
            self._stream.begin_capture()
            try:
                result = work()
            except BaseException:
                # The stream must not stay in this state; what went wrong is said by the first error.
                with suppress(RuntimeError):
                    self._stream.end_capture()
                raise
            return CupyGraph(self._stream.end_capture(), self._stream), result

    def free_memory(self) -> int:
        """Return the bytes that the driver has free."""
        self._enter()
        return int(self._cupy.cuda.runtime.memGetInfo()[0])

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    @property
    def stream(self) -> int:
        """The stream of all work, as the number that libraries take."""
        return int(self._stream.ptr)

    def launch(
        self, unit: Unit, kernel: str, grid: tuple[int, ...], block: int, args: tuple[Any, ...], shared: int = 0
    ) -> None:
        """Start a kernel."""
        self._enter()
        function = self._kernels.get((unit, kernel)) or self._kernel(unit, kernel)
        if shared > SHARED_BYTES and function.max_dynamic_shared_size_bytes < shared:
            function.max_dynamic_shared_size_bytes = shared
        values = tuple(np.uint64(0) if arg is None else arg for arg in args)
        function((*grid, 1, 1)[:3], (block, 1, 1), values, shared_mem=shared)

    def _kernel(self, unit: Unit, name: str) -> Any:
        module = self._modules.get(unit)
        # The first rank of a node compiles, when it asks for a kernel; the others then find all in CuPy's cache.
        with nullcontext() if module else alone(user_cache(), f"{unit} {self.warp}"):
            if module is None:
                text = assemble(unit, self.warp)
                module = self._modules[unit] = self._cupy.RawModule(code=text, options=("-std=c++17",))
            try:
                function = module.get_function(name)
            except (RuntimeError, OSError, self._cupy.cuda.compiler.CompileException) as error:
                raise compile_failure(self.name, unit.file, error) from error
        self._kernels[unit, name] = function
        return function

    def gemm(self, x: Array, w: Array, out: Array) -> None:
        """Set out = x w^T, summed in float32 (not TF32)."""
        self._enter()
        blas, runtime = self._blas, self._cupy.cuda.runtime
        n_tokens, n_in = x.shape
        n_rows = w.shape[0]
        types = {"float32": runtime.CUDA_R_32F, "float16": runtime.CUDA_R_16F, "uint16": runtime.CUDA_R_16BF}
        type = types[x.dtype.name]
        handle = self._cupy.cuda.device.get_cublas_handle()
        one, zero = np.array(1, np.float32), np.array(0, np.float32)
        mode = blas.getPointerMode(handle)
        blas.setPointerMode(handle, blas.CUBLAS_POINTER_MODE_HOST)
        # cuBLAS thinks in columns: there, w is (n_in, n_rows), and the result (n_rows, n_tokens).
        left = (w.data.ptr, type, n_in)
        right = (x.data.ptr, type, n_in)
        result = (out.data.ptr, runtime.CUDA_R_32F, n_rows)
        how = blas.CUBLAS_OP_T, blas.CUBLAS_OP_N, n_rows, n_tokens, n_in
        # CuPy hands hipBLAS the type of the sums.
        end = runtime.CUDA_R_32F if self.name == "hip" else blas.CUBLAS_COMPUTE_32F, blas.CUBLAS_GEMM_DEFAULT
        try:
            blas.gemmEx(handle, *how, one.ctypes.data, *left, *right, zero.ctypes.data, *result, *end)
        except blas.CUBLASError as error:
            free, _ = self._cupy.cuda.runtime.memGetInfo()
            raise UserError(
                f"GPU {self.index} failed in a large product ({error}; {free / 1e9:.1f} GB are free): use a smaller -c "
                "or -ub"
            ) from None
        finally:
            blas.setPointerMode(handle, mode)
