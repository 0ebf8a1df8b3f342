"""Models give the same logits on every grid: stages, ranks within stages, slices of experts or whole ones."""

import numpy as np
import pytest

from mpillama.grid import Grid
from shared import shared
from test_golden import MODELS
from tiny import nmse, run_on

GRIDS = [Grid(tp, pp) for pp in (1, 2) for tp in (1, 2, 3) if tp * pp > 1]


def golden(name, weights, chunk, grid, experts="off"):
    reference = np.load(shared("golden", f"{name}.npz"))
    path = shared("golden", f"{name}.gguf")
    results = run_on(path, reference["tokens"].tolist(), weights, chunk, grid=grid, experts=experts)
    assert nmse(results[0], reference["logits"]) <= 1e-6, (name, grid, weights, experts)
    for rank in range(grid.size - grid.tp, grid.size):
        np.testing.assert_array_equal(results[rank].view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid.tp}x{grid.pp}")
@pytest.mark.parametrize("name", MODELS)
def test_golden_logits_on_a_grid(name, grid):
    for chunk in (24, 5, 1):
        golden(name, [1.0] * grid.size, chunk, grid)
