"""The contract of groups and worlds over MPI, and the forward pass on MPI ranks."""

import numpy as np
import pytest

from comm_contract import CONTRACT
from mpillama.comm.mpi import MPIWorld
from mpillama.grid import Grid
from shared import shared
from tiny import logits_of, nmse, open_runner, write_llama


@pytest.fixture(scope="module")
def world():
    return MPIWorld()


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, world):
    check(world)


@pytest.mark.parametrize(
    "name", ["llama-dense", "gemma3-dense", "olmo2-dense", "qwen3-dense", "gpt-oss-moe", "qwen2moe-moe"]
)
def test_golden_logits(name, world):
    reference = np.load(shared("golden", f"{name}.npz"))
    runner, _ = open_runner(world, shared("golden", f"{name}.gguf"), [1.0] * world.size)
    for chunk in (24, 1):
        logits = logits_of(runner, reference["tokens"].tolist(), chunk)
        assert nmse(logits, reference["logits"]) <= 1e-6
        assert world.bcast(logits.tobytes()) == logits.tobytes()


def test_each_rank_reads_its_share(world, tmp_path, rng):
    path = world.bcast(str(write_llama(tmp_path / "m.gguf", rng, n_head=12, n_head_kv=12, n_ff=1536)))
    _, n_read = open_runner(world, path, [1.0] * world.size)
    total = world.bcast(sum(world.gather(n_read)))
    assert n_read < 1.2 * total / world.size


@pytest.mark.parametrize("name", ["gemma3-dense", "gpt-oss-moe"])
def test_golden_logits_of_two_stages(name, world):
    if world.size % 2:
        pytest.skip("two stages need an even number of ranks")
    reference = np.load(shared("golden", f"{name}.npz"))
    grid = Grid(world.size // 2, 2)
    path, weights = shared("golden", f"{name}.gguf"), [5.0, 2.0, 1.0, 3.0][: world.size]
    runner, _ = open_runner(world, path, weights, grid=grid, experts="on")
    for chunk in (24, 3):
        logits = logits_of(runner, reference["tokens"].tolist(), chunk)
        if world.rank == 0 or grid.place(world.rank).stage == 1:
            assert nmse(logits, reference["logits"]) <= 1e-6
