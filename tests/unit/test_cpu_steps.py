"""Steps of the cpu backend that are recorded and played: the same bits as without, whatever comes between."""

import datetime
import threading
import time
from functools import partial

import numpy as np
import pytest

from mpillama.backends.base import KV_BLOCK
from mpillama.comm.metered import MeteredGroup
from mpillama.comm.shared import SharedGroup
from mpillama.comm.threads import run_threads
from mpillama.errors import JobError
from mpillama.gguf.types import GGMLType
from shared import shared
from shared_ranks import run_shared
from step_cases import schedule
from tiny import open_runner, write_llama

pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama import _cpu
from mpillama.backends.cpu.backend import CpuBackend

N_BLOCKS = 48


def same_bits(path, batches, weights, kv_type="f16", experts="off", run=None, join=None):
    """Run batches with and without recordings on ranks of these weights, and compare what each rank gets.

    ``run`` runs a function on all ranks, threads of their own by default; ``join`` makes their groups.
    """

    def main(world, graphs):
        n_ctx, make = N_BLOCKS * KV_BLOCK, partial(CpuBackend, 2)
        runner, _ = open_runner(world, path, weights, n_ctx, kv_type, make, None, experts, join, graphs)
        # Results are looked at in the end: they must not change with later steps.
        return [runner.run(batch) for batch in batches]

    run = run or partial(run_threads, len(weights))
    plain, recorded = (run(partial(main, graphs=graphs)) for graphs in (False, True))
    for expected, got in zip(plain, recorded, strict=True):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a.view("u4"), b.view("u4"))


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_played_steps_give_the_same_bits(weights, kv_type, tmp_path, rng, calls):
    type = [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.F32][int(rng.integers(3))]
    path = write_llama(tmp_path / "m.gguf", rng, type, n_embd=192, n_head=6, n_head_kv=3, n_head_dim=32, n_layer=2)
    batches = schedule(rng, 96, 60, N_BLOCKS, 230, some_rows=True)
    same_bits(path, batches, weights, kv_type=kv_type)
    # One runner ran the text each time, the other one played most steps.
    assert len(calls) < 1.8 * len(weights) * len(batches)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3-dense",
        "gemma2-dense",
        "gemma3-dense",
        "phi3-dense",
        "granite-dense",
        "olmo2-dense",
        "qwen2-dense",
        "llama-moe",
        "olmoe-moe",
        "qwen2moe-moe",
        "qwen3moe-moe",
        "gpt-oss-moe",
    ],
)
def test_architectures_are_played(name, rng, calls):
    path = shared("golden", f"{name}.gguf")
    n_vocab = len(np.load(shared("golden", f"{name}.npz"))["logits"][0])
    batches = schedule(rng, n_vocab, 30, N_BLOCKS, 230, some_rows=True)
    same_bits(path, batches, (1.0,))
    assert len(calls) < 2 * len(batches)


@pytest.mark.parametrize("hosts", [[[0, 1]], [[0, 1, 2]], [[0, 1], [2]]], ids=str)
def test_collectives_in_shared_memory(hosts, tmp_path, rng, calls, monkeypatch):
    """Within a host native code makes them, and keeps account of them as Python does."""
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q8_0, n_embd=192, n_head=6, n_head_kv=3, n_head_dim=32)
    batches, n_ranks = schedule(rng, 96, 40, N_BLOCKS, 230), sum(map(len, hosts))
    by_python, groups, allreduce = [], {}, SharedGroup.allreduce
    monkeypatch.setattr(SharedGroup, "allreduce", lambda group, x: by_python.append(0) or allreduce(group, x))

    def join(world, backend):
        group = MeteredGroup(world.group())
        groups.setdefault(world.rank, []).append(group)
        return group

    same_bits(path, batches, (1.0,) * n_ranks, run=partial(run_shared, hosts), join=join)
    assert len(calls) < 1.8 * n_ranks * len(batches)
    for plain, recorded in groups.values():
        a, b = plain.traffic, recorded.take()
        assert (b.calls, b.nbytes) == (a.calls, a.nbytes)
        assert b.ns > 0
        assert recorded.traffic.calls == recorded.traffic.ns == 0
    n_all = sum(plain.traffic.calls for plain, _ in groups.values())
    assert (len(by_python) < 1.6 * n_all) == (len(hosts) == 1)


def played_allreduce(world, n):
    """Play an allreduce of n ones on a rank, twice; returns the sums."""
    calls, x = _cpu.Calls(), np.ones(n, np.float32)
    call = world.group().native_allreduce(x)
    calls.foreign(call.capsule)
    world.watch.begin_step()
    calls.play()
    calls.play()
    return x, world.watch.where


def test_a_played_collective_that_some_rank_does_not_come_to():
    for x, where in run_shared([[0, 1, 2]], lambda world: played_allreduce(world, 7)):
        np.testing.assert_array_equal(x, 9)
        assert where == "allreduce 2 of step 1"

    def diverging(world):
        with pytest.raises(JobError, match="allreduce 1 of step 1 with something else: the ranks have diverged"):
            played_allreduce(world, 7 + world.rank)

    run_shared([[0, 1]], diverging)

    def late(world):
        if world.rank:
            world.group()
            time.sleep(1.5)
            return
        with pytest.raises(JobError, match=r"rank 1 on host0 has not come to allreduce 1 of step 1 within 0\.2 s"):
            played_allreduce(world, 7)

    run_shared([[0, 1]], late, limit=0.2)
    with pytest.raises(ValueError, match="incorrect name"):
        _cpu.Calls().foreign(datetime.datetime_CAPI)


@pytest.mark.parametrize("experts", ["off", "on"])
def test_experts_on_several_ranks(experts, rng, calls):
    """Slices of every expert are played; which of a rank's whole experts are asked for is not what the router says."""
    path = shared("golden", "qwen3moe-moe.gguf")
    batches = schedule(rng, len(np.load(path.with_suffix(".npz"))["logits"][0]), 30, N_BLOCKS, 230, some_rows=True)
    same_bits(path, batches, (1.0, 1.0), experts=experts)
    assert (len(calls) < 2 * 2 * len(batches)) == (experts == "off")


def test_a_kernel_that_fails_while_it_is_played():
    pool, wrong = _cpu.Pool(1), np.zeros(3, np.float32)
    played = _cpu.Calls()
    played.sigmoid(pool, wrong, out := np.empty(3, np.float32))
    played.sigmoid(pool, wrong, np.empty(4, np.float32))
    assert len(played) == 2
    for _ in range(2):
        out[:] = 0
        with pytest.raises(ValueError, match="sizes differ"):
            played.play()
        np.testing.assert_array_equal(out, 0.5)
    with pytest.raises(TypeError):
        played.sigmoid(pool, wrong, [1.0])


def test_other_threads_run_while_kernels_are_played():
    """The interpreter is not held from the first kernel to the last."""
    pool, x, out = _cpu.Pool(1), *np.zeros((2, 1 << 16), np.float32)
    played = _cpu.Calls()
    for _ in range(2000):
        played.sigmoid(pool, x, out)
    thread = threading.Thread(target=played.play)
    thread.start()
    seen = 0
    while thread.is_alive():
        time.sleep(0.001)
        seen += 1
    thread.join()
    assert seen > 5


def test_large_steps_are_not_kept(tmp_path, rng, calls, monkeypatch):
    path = write_llama(tmp_path / "m.gguf", rng)
    batches = schedule(rng, 96, 60, N_BLOCKS, 230, some_rows=True)
    monkeypatch.setattr("mpillama.backends.cpu.steps._MAX_BYTES", 1000)
    same_bits(path, batches, (1.0,))
    assert len(calls) == 2 * len(batches)
