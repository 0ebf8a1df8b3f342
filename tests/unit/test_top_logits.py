"""Steps that bring only the largest logits: the same ones as are largest of all."""

from dataclasses import replace

import numpy as np
import pytest

from gpu_host import emulated, needs_compiler
from mpillama.backends.cpu.backend import CpuBackend
from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.threads import run_threads
from mpillama.engine.sequence import Sequence
from mpillama.grid import Grid
from mpillama.runner import pack, unpack
from tiny import open_runner, write_llama

BACKENDS = [
    ReferenceBackend,
    lambda: CpuBackend(2),
    pytest.param(lambda: emulated(32, 0), marks=needs_compiler),
]


@pytest.mark.parametrize("make", BACKENDS, ids=["reference", "cpu", "emulated"])
@pytest.mark.parametrize("grid", [Grid(1, 1), Grid(3, 1), Grid(2, 2), Grid(1, 2)], ids=str)
def test_largest_logits_on_any_grid(grid, make, tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=2)
    tokens, k = rng.integers(0, 96, 40).tolist(), int(rng.integers(1, 128))
    weights = rng.uniform(1, 2, grid.size).tolist()

    def main(world):
        found = []
        for n_top in (0, k):
            runner, _ = open_runner(world, path, weights, make=make, grid=grid)
            sequence = Sequence(tokens, np.arange(runner.n_blocks))
            parts = []
            while sequence.pending:
                batch = replace(sequence.next_batch(13, all_logits=True), n_top=n_top)
                parts.append(runner.run(unpack(pack(batch))))
            found.append(np.concatenate(parts))
        return found

    for rank, (logits, top) in enumerate(run_threads(grid.size, main)):
        if rank == 0 or rank >= grid.size - grid.tp:
            np.testing.assert_array_equal(top, ReferenceBackend().top_k(logits, k, 0))
