"""Steps as graphs: what decoding a batch starts on the device is recorded once, then started as a whole.

A token of a large model is a thousand kernels, each of which takes longer to ask for than to run. Recorded are steps of
one token for each sequence. A graph serves all batches of as many sequences whose longest one is below the same bound:
tokens, positions, KV blocks and rows are read from `StepInputs`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import Batch
from mpillama.backends.gpu.backend import GpuBackend
from mpillama.backends.gpu.device import Array, Graph
from mpillama.backends.gpu.inputs import StepInputs, seen_bound
from mpillama.backends.recent import Recent

Work = Callable[[Batch, "Array | None"], Array]

_MAX_GRAPHS = 64
# More sequences fill a device with each kernel.
_MAX_TOKENS = 256


@dataclass
class _Shape:
    """Batches that look alike, and what is kept for them; ``graph`` and ``result`` from the second of them on."""

    inputs: StepInputs
    residual: Array | None
    graph: Graph | None = None
    result: Array | None = None


class Steps:
    """Runs the steps of one model on one rank.

    Ranks that see the same batches record the same ones.

    Args:
        backend: of the rank.
        work: runs a batch, with the residual that an earlier stage has left or None; it depends on nothing else.
        capture: record, if the device can.
    """

    def __init__(self, backend: GpuBackend, work: Work, capture: bool) -> None:
        self._shapes: Recent[tuple[int, ...], _Shape] = Recent(_MAX_GRAPHS)
        self._backend, self._device, self._work = backend, backend.device, work
        self.captures = capture and self._device.can_capture

    def __del__(self) -> None:
        # Before the communicator that `work` uses: NCCL does not end one while a graph has recorded its calls.
        self._shapes.clear()

    def __call__(self, batch: Batch, residual: np.ndarray | None) -> Array:
        """Run a batch. The result is good until the next one."""
        if not self.captures or not self._fits(batch):
            self._backend.begin_step(StepInputs(self._device, batch))
            return self._work(batch, None if residual is None else self._device.upload(residual))
        width = 0 if residual is None else residual.shape[1]
        key = len(batch.tokens), len(batch.logit_rows), batch.n_top, seen_bound(batch), width
        shape = self._shapes.get(key)
        if shape is None:
            shape = _Shape(StepInputs(self._device, batch), None if residual is None else self._device.upload(residual))
            self._shapes.put(key, shape)
            self._backend.begin_step(shape.inputs)
            return self._work(batch, shape.residual)
        shape.inputs.update(batch)
        if residual is not None:
            self._device.write(shape.residual, residual)
        if shape.graph is None:
            # Done once now, it leaves as much memory as the recording will need, beside what other graphs keep.
            self._backend.begin_step(shape.inputs)
            with self._device.graph_memory():
                self._work(batch, shape.residual)
            self._backend.begin_step(shape.inputs)
            shape.graph, shape.result = self._device.capture(lambda: self._work(batch, shape.residual))
        shape.graph.launch()
        return shape.result

    def _fits(self, batch: Batch) -> bool:
        n_tokens, gemm_tokens = len(batch.tokens), self._device.gemm_tokens
        few = 0 < n_tokens <= _MAX_TOKENS and not 0 < gemm_tokens <= n_tokens
        return few and len(batch.seq_lens) == n_tokens and not batch.embedding
