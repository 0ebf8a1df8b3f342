"""The GPU backend."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

from mpillama.backends.base import Batch, Stepper
from mpillama.backends.gpu.attention import AttentionOps
from mpillama.backends.gpu.device import Array, Device
from mpillama.backends.gpu.matmul import GEMM_ELEMENTS
from mpillama.config import Config

# Kernels, inputs of steps, parts that blocks of threads add up, graphs.
_LEAST_BYTES = 64 << 20
# A library for large products, and the weights that are made floats for it.
_BLAS_BYTES = (64 << 20) + 2 * GEMM_ELEMENTS
# Its buffers for each connection to another GPU, of which it has some 32.
_NCCL_BYTES = 256 << 20
# Tokens of a prompt whose logits are wanted, but for those who ask for all.
_WANTED_TOKENS = 64


class GpuBackend(AttentionOps):
    """All ops on one device.

    Products of quantized weights round the activations to 8 bits, a factor for each 32 of them (relative error about
    5e-3); those of 9 tokens and more on matrix units, or of very many tokens by a library, round weights and
    activations to float16 instead (below 1e-3). Products of F32 weights are float32 throughout; attention is in
    `attention.py`.
    """

    host_arrays = False

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self.name = device.name

    def stepper(self, ops: Any, work: Callable[[Batch, Array | None], Array], capture: bool) -> Stepper:
        """Return what runs the steps of a model; see `base.Stepping`."""
        from mpillama.backends.gpu.steps import Steps

        return Steps(self, work, capture and ops.capturable)

    def stream_gbps(self, n_threads: int, n_bytes: int = 1 << 30) -> float:
        """Return the 1e9 bytes per second that a copy within the device's memory moves, read and written."""
        # The emulated device has only to come through.
        n_bytes = min(n_bytes, self.free_memory() // 4) or 1 << 20
        source, target = (self.device.empty((n_bytes // 4,)) for _ in range(2))
        times: list[float] = []
        began = time.perf_counter()
        while len(times) < 4 or time.perf_counter() - began < 0.4:
            self.device.synchronize()
            start = time.perf_counter()
            self.device.copy(target, source)
            self.device.synchronize()
            times.append(time.perf_counter() - start)
        return 2 * source.nbytes / median(times) / 1e9

    def work_bytes(self, cfg: Config, n_tokens: int, n_slices: int, n_here: int = 1) -> int:
        """Return the bytes that a step of so many tokens needs at most, beside weights and cache, and the libraries.

        Args:
            cfg: of the model.
            n_tokens: in a step.
            n_slices: into which each matrix is cut.
            n_here: of them on this device.
        """
        heads = (cfg.n_head + 2 * cfg.n_head_kv) * max(cfg.n_embd_head_k, cfg.n_embd_head_v)
        # Of each token, float32: the residual, a branch, what goes in and comes out of a product; what makes a branch.
        n_ff = cfg.n_ff_shexp if cfg.n_expert else cfg.n_ff
        numbers = 4 * cfg.n_embd + max(3 * heads, 4 * n_ff) // n_slices
        if cfg.n_expert:
            numbers += cfg.n_expert_used * (4 * cfg.n_ff_exp // n_slices + 2 * cfg.n_embd)
        logits = 2 * min(n_tokens, _WANTED_TOKENS) * cfg.n_vocab
        libraries = (_BLAS_BYTES if self.device.gemm_tokens else 0) + (_NCCL_BYTES if n_slices > n_here else 0)
        # A fifth of a pool may lie between arrays.
        return _LEAST_BYTES + libraries + 5 * n_here * (n_tokens * numbers + logits)

    def free_memory(self) -> int:
        """Return the bytes that are free on the device; 0 if it has no memory of its own."""
        return self.device.free_memory()
