"""Steps of decoding on the CPU: recorded once for each shape, then played (see `recorder`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mpillama.backends.base import Batch
from mpillama.backends.cpu.recorder import Recorder, Tape
from mpillama.backends.recent import Recent

if TYPE_CHECKING:
    from mpillama.backends.cpu.backend import CpuBackend

# Shapes whose steps are kept, sequences of one, bytes of its results. Of larger steps the text is a small part.
_MAX_SHAPES, _MAX_TOKENS, _MAX_BYTES = 16, 32, 64 << 20
_LEAST_BLOCKS = 8

Work = Callable[[Batch, "np.ndarray | None"], np.ndarray]


class Recording(Protocol):
    """The ops of a model text, as far as recording is concerned.

    Attributes:
        alike: whether all ranks compute the same bits from the same input.
    """

    @property
    def alike(self) -> bool:
        """Whether all ranks compute the same bits from the same input."""
        ...

    def recorded_by(self, backend: Any, tape: Any) -> Any:
        """Return a context in which ``backend`` does what is asked, and ``tape`` gets the collectives."""
        ...


@dataclass
class _Shape:
    """Batches that look alike; what follows ``batch`` is there once the second of them was run."""

    batch: Batch | None = None
    residual: np.ndarray | None = None
    result: np.ndarray | None = None
    tape: Tape | None = None


class CpuSteps:
    """Runs the steps of one model on one rank.

    Args:
        backend: of the rank.
        ops: over the backend.
        work: runs a batch with ``ops``, with the residual that an earlier stage has left or None.
    """

    def __init__(self, backend: CpuBackend, ops: Recording, work: Work) -> None:
        self._backend, self._ops, self._work = backend, ops, work
        self._shapes: Recent[tuple[int, ...], _Shape] = Recent(_MAX_SHAPES)
        # Sequences of a step that is worth keeping; 0 if the model's cannot be recorded.
        self._max_tokens = _MAX_TOKENS

    def __call__(self, batch: Batch, residual: np.ndarray | None) -> np.ndarray:
        """Run a batch."""
        n = len(batch.tokens)
        if not 0 < n == len(batch.seq_lens) <= self._max_tokens or batch.embedding:
            return self._work(batch, residual)
        n_blocks = _LEAST_BLOCKS
        while n_blocks < batch.block_tables.shape[1]:
            n_blocks *= 2
        key = n, len(batch.logit_rows), n_blocks, batch.n_top
        shape = self._shapes.get(key)
        if shape is None:
            # A shape that comes once is not worth it.
            self._shapes.put(key, _Shape())
            return self._work(batch, residual)
        if shape.tape is None:
            return self._record(shape, batch, residual, n_blocks)
        assert shape.batch is not None
        assert shape.result is not None
        _fill(shape.batch, batch)
        if residual is not None:
            assert shape.residual is not None
            shape.residual[:] = residual
        shape.tape.play()
        # It may be on its way to another rank when the next step is played.
        return shape.result.copy()

    def _record(self, shape: _Shape, batch: Batch, residual: np.ndarray | None, n_blocks: int) -> np.ndarray:
        tape, n = Tape(), len(batch.tokens)
        own = Batch(
            tokens=np.empty(n, np.int32),
            positions=np.empty(n, np.int32),
            seq_lens=np.empty(n, np.int32),
            block_tables=np.empty((n, n_blocks), np.int32),
            logit_rows=np.empty(len(batch.logit_rows), np.int32),
            n_top=batch.n_top,
        )
        _fill(own, batch)
        kept = None if residual is None else np.array(residual)
        with self._ops.recorded_by(Recorder(self._backend, tape), tape):
            result = self._work(own, kept)
        if not tape.complete:
            self._max_tokens = 0
        elif tape.nbytes > _MAX_BYTES:
            self._max_tokens = n - 1
        else:
            shape.batch, shape.residual, shape.result, shape.tape = own, kept, result, tape
        return result.copy()


def _fill(own: Batch, batch: Batch) -> None:
    own.tokens[:], own.positions[:], own.seq_lens[:] = batch.tokens, batch.positions, batch.seq_lens
    own.logit_rows[:] = batch.logit_rows
    own.block_tables[:] = -1
    own.block_tables[:, : batch.block_tables.shape[1]] = batch.block_tables
