"""Models give the same logits on every grid: stages, ranks within stages, slices of experts or whole ones."""

import threading

import numpy as np
import pytest

from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.engine.sequence import Sequence
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType
from mpillama.grid import Grid
from mpillama.partition import Partition
from mpillama.runner import Runner, kv_bytes
from mpillama.steps import Leader, follow
from mpillama.tensors import model_tensors
from shared import shared
from tiny import nmse, open_runner, run_on, write_llama

# Two blocks each.
MODELS = (
    *("llama-dense", "mistral3-dense", "qwen2-dense", "qwen3-dense", "gemma2-dense", "gemma3-dense", "phi3-dense"),
    *("granite-dense", "olmo2-dense"),
)
MOE_MODELS = ("llama-moe", "qwen2moe-moe", "qwen3moe-moe", "olmoe-moe", "gpt-oss-moe")
SHARES = {1: [1.0], 2: [5.0, 2.0], 3: [5.0, 2.0, 1.0]}


def check_golden(name, rng, grid, weights, experts="off"):
    reference = np.load(shared("golden", f"{name}.npz"))
    chunk = int(rng.choice([24, 7, 5, 2]))
    path, tokens = shared("golden", f"{name}.gguf"), reference["tokens"].tolist()
    results = run_on(path, tokens, weights, chunk, grid=grid, experts=experts)
    assert nmse(results[0], reference["logits"]) <= 1e-6, (name, grid, weights, chunk, experts)
    for rank in range(grid.size - grid.tp, grid.size):
        np.testing.assert_array_equal(results[rank].view(np.uint32), results[0].view(np.uint32))


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("name", [*MODELS, *MOE_MODELS])
def test_two_stages(name, tp, rng):
    check_golden(name, rng, Grid(tp, pp=2), [1.0] * 2 * tp if rng.integers(2) else 2 * SHARES[tp])


@pytest.mark.parametrize("name", [*MODELS, *MOE_MODELS])
def test_uneven_shares(name, rng):
    """As -ts 5,2,1 and others; test_golden.py has even shares, and those of two stages are above."""
    check_golden(name, rng, Grid(3), SHARES[3])
    check_golden(name, rng, Grid(5), [1.0] * 5 if rng.integers(2) else [5.0, 2.0, 1.0, 1.0, 3.0])


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (3, 1), (4, 1), (5, 1), (6, 1), (1, 2), (2, 2), (3, 2)])
@pytest.mark.parametrize("name", MOE_MODELS)
def test_whole_experts(name, tp, pp, rng):
    shares = SHARES.get(tp, [5.0, 2.0, 1.0, 1.0, 3.0, 0.0][:tp])
    check_golden(name, rng, Grid(tp, pp), pp * (shares if rng.integers(2) else [1.0] * tp), "on")


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.Q4_K, GGMLType.Q8_0])
@pytest.mark.parametrize("experts", ["on", "auto", None])
def test_random_models_on_random_grids(experts, type, tmp_path, rng):
    """Any number of blocks, KV heads and ranks, and shares that divide nothing."""
    n_layer = int(rng.integers(3, 6))
    sizes = {"n_layer": n_layer, "n_head": 12, "n_head_kv": int(rng.choice([1, 2, 3])), "tied": bool(rng.integers(2))}
    if experts:
        sizes |= {"n_expert": int(rng.integers(2, 9)), "n_expert_used": 2, "n_ff": 256}
    path = write_llama(tmp_path / "m.gguf", rng, type, **sizes)
    tokens = rng.integers(0, 96, 11).tolist()
    alone = run_on(path, tokens, [1.0])[0]
    for tp, pp in ((1, 3), (2, 3), (5, 1), (1, n_layer)):
        weights = rng.uniform(0.2, 3.0, tp * pp).tolist()
        results = run_on(path, tokens, weights, 4, grid=Grid(tp, pp), experts=experts or "off")
        assert nmse(results[0], alone) < 1e-9, (sizes, tp, pp, weights)


def native():
    from mpillama.backends.cpu.backend import CpuBackend

    return CpuBackend(1)


@pytest.mark.parametrize("make", [ReferenceBackend, native])
def test_experts_of_other_ranks_are_zero(make, rng):
    from mpillama.backends.base import RawWeight
    from tiny import random_blocks

    backend = make()
    weight = backend.weight(RawWeight("w", GGMLType.Q8_0, random_blocks(rng, GGMLType.Q8_0, (4, 48, 64)), 64))
    x = rng.standard_normal((9, 64)).astype("f4")
    index = rng.integers(0, 4, (9, 3))
    full = backend.expert_linear(x, weight, index)
    gaps = rng.random((9, 3)) < 0.5
    some = backend.expert_linear(x, weight, np.where(gaps, -1, index))
    assert (some[gaps] == 0).all()
    # BLAS adds up in an order that depends on how many tokens an expert has.
    np.testing.assert_allclose(some[~gaps], full[~gaps], rtol=1e-5, atol=1e-5)
    own = backend.expert_linear(np.repeat(x[:, None], 3, axis=1), weight, np.where(gaps, -1, index))
    np.testing.assert_array_equal(own, some)
    assert not backend.expert_linear(x, weight, np.full((9, 3), -1)).any()


def test_each_byte_is_read_by_one_stage(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=5, n_head=8, n_head_kv=4, n_expert=6, n_expert_used=2)
    header = read_header(path)
    cfg = read_config(header)
    tensors = model_tensors(header, cfg)
    whole = sum(info.nbytes for info in tensors.values())
    for grid, experts in ((Grid(1, 5), "off"), (Grid(2, 2), "on"), (Grid(3, 1), "on")):
        read = run_threads(
            grid.size, lambda world, g=grid, e=experts: open_runner(world, path, [1.0] * g.size, grid=g, experts=e)[1]
        )
        partition = Partition(cfg, tensors, grid, [1.0] * grid.size, experts)
        assert read == [partition.bytes_of(rank) for rank in range(grid.size)]
        assert whole <= sum(read) < 1.02 * whole
        kv = [kv_bytes(cfg, *partition.of(rank), 64, "f32", "f32") for rank in range(grid.size)]
        # With 4 KV heads on 3 ranks, one is shared or not, but none is missing.
        assert sum(kv) >= 5 * 64 * 4 * 2 * 64 * 4
        assert sum(kv) == 5 * 64 * 4 * 2 * 64 * 4 or grid.tp == 3


def test_a_tied_head_is_read_by_the_first_and_the_last_stage(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=3, tied=True)
    header = read_header(path)
    embedding = header.tensors["token_embd.weight"].nbytes
    read = run_threads(3, lambda world: open_runner(world, path, [1.0] * 3, grid=Grid(1, 3))[1])
    assert sum(read) == sum(info.nbytes for info in header.tensors.values()) + embedding


class HeldBack(Runner):
    """A runner that starts only when it is told to."""

    go: threading.Event

    def begin(self, batch):
        assert self.go.wait(20)
        return super().begin(batch)


def on_a_pipeline(path, n_stages, lead, go=None):
    """Return what ``lead(leader, runner)`` returns on rank 0 of a pipeline whose last stage waits for ``go``."""

    def main(world):
        runner, _ = open_runner(world, path, [1.0] * n_stages, grid=Grid(1, n_stages))
        if go and world.rank == n_stages - 1:
            runner.__class__, runner.go = HeldBack, go
        if world.rank:
            return follow(world, runner)
        leader = Leader(world, runner, max_in_flight=n_stages)
        result = lead(leader, runner)
        leader.stop()
        return result

    return run_threads(n_stages, main)[0]


def test_a_prompt_does_not_wait_for_the_last_stage(tmp_path, rng):
    """The first micro-batches are through with the first stage before the last stage has begun."""
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=3)
    tokens, go = rng.integers(0, 96, 50).tolist(), threading.Event()

    def lead(leader, runner):
        sequence = Sequence(tokens, np.arange(runner.n_blocks))
        for _ in range(2):
            assert len(leader.run(sequence.next_batch(10))) == 0
        go.set()
        while sequence.pending:
            logits = leader.run(sequence.next_batch(10))
        return logits

    assert nmse(on_a_pipeline(path, 3, lead, go), run_on(path, tokens, [1.0])[0][-1:]) < 1e-9


def test_sequences_keep_all_stages_busy(tmp_path, rng):
    """As many batches in flight as there are stages; each answer is that of its own sequence."""
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=3)
    prompts = [rng.integers(0, 96, 9).tolist() for _ in range(4)]

    def lead(leader, runner):
        sequences = [Sequence(prompt, np.array([i])) for i, prompt in enumerate(prompts)]
        found = [[] for _ in prompts]
        order = []
        while any(sequence.pending for sequence in sequences) or order:
            for i, sequence in enumerate(sequences):
                if leader.in_flight == 3:
                    found[order.pop(0)].append(leader.collect())
                if sequence.pending:
                    leader.submit(sequence.next_batch(2, all_logits=True))
                    order.append(i)
            while order:
                found[order.pop(0)].append(leader.collect())
        return [np.concatenate(parts) for parts in found]

    for prompt, logits in zip(prompts, on_a_pipeline(path, 3, lead), strict=True):
        assert nmse(logits, run_on(path, prompt, [1.0])[0]) < 1e-9


def test_too_many_batches_in_flight_are_refused(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng)

    def lead(leader, runner):
        sequence = Sequence([1, 2, 3, 4], np.arange(runner.n_blocks))
        for _ in range(2):
            leader.submit(sequence.next_batch(1))
        with pytest.raises(AssertionError, match="2 batches are in flight"):
            leader.submit(sequence.next_batch(1))
        leader.collect()
        leader.collect()

    on_a_pipeline(path, 2, lead)
