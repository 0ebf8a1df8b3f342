"""The contract of groups and worlds over MPI, and the forward pass on MPI ranks."""

import numpy as np
import pytest
from mpi4py import MPI

from comm_contract import CONTRACT
from mpillama.comm.mpi import MPIGroup, MPIWorld
from mpillama.comm.shared import SharedGroup, native_module_is_built
from mpillama.gguf.types import GGMLType
from mpillama.grid import Grid
from relay_case import Case, assert_same
from shared import shared
from tiny import logits_of, nmse, open_runner, write_llama

# Names of pretended hosts, by rank; ranks of the same name share memory.
HOSTS = {"one host": "aaaaaaaa", "cyclic": "abababab", "uneven": "aaabbbbb", "lonely": "abcdefgh"}


@pytest.fixture(scope="module")
def world():
    return MPIWorld()


@pytest.fixture(scope="module", params=[*HOSTS, "no shared memory"])
def any_world(request):
    size = MPI.COMM_WORLD.size
    world = MPIWorld(hosts=HOSTS.get(request.param, "a" * size)[:size], shared=request.param in HOSTS)
    assert isinstance(world.group(), SharedGroup if request.param in HOSTS and world.size > 1 else MPIGroup)
    return world


@pytest.mark.skipif(not native_module_is_built(), reason="mpillama._shm is not built")
@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_contract(check, any_world):
    check(any_world)


def test_sums_are_the_same_whatever_shares_memory(any_world, rng):
    x = (rng.standard_normal((any_world.size, 3001)) * 10.0 ** rng.integers(-3, 3, (any_world.size, 3001))).astype("f4")
    total = any_world.group().allreduce(x[any_world.rank].copy())
    np.testing.assert_allclose(total, x.astype("f8").sum(axis=0), rtol=1e-5, atol=1e-4)
    assert any_world.bcast(total.tobytes()) == total.tobytes()


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


def test_reading_together_gives_the_same_weights(any_world, tmp_path, rng):
    world, shares = any_world, rng.uniform(0.0, 3.0, any_world.size) + 0.1
    path = world.bcast(
        str(write_llama(tmp_path / "m.gguf", rng, GGMLType.Q4_K, n_head=12, n_head_kv=4, n_expert=5, n_expert_used=2))
    )
    chunk_bytes = int(2 ** rng.uniform(13, 20))
    for grid in (Grid(world.size), Grid(1, 1, world.size)):
        case = Case(path, grid, shares.tolist()[: grid.replica_size])
        if world.size > 1:
            together, n_read = case.relay(world, chunk_bytes)
            assert_same(together, case.direct(world)[0])
            n_file = sum(info.nbytes for info in case.tensors.values())
            total = world.bcast(sum(world.gather(n_read)))
            assert n_file <= total <= n_file + 32 * len(case.tensors)


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
