"""Steps of the cpu backend that are recorded and played: the same bits as without, whatever comes between."""

import numpy as np
import pytest

import mpillama.runner
from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.comm.threads import run_threads
from mpillama.config import read_config
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType
from mpillama.grid import Grid
from mpillama.loader import load_weights
from mpillama.ops import Ops
from mpillama.partition import Partition
from mpillama.runner import Runner
from mpillama.tensors import model_tensors
from shared import shared
from tiny import write_llama

pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.backend import CpuBackend

N_BLOCKS = 48


def open_on(world, path, graphs, weights, kv_type="f16", threads=2):
    header = read_header(path)
    cfg = read_config(header, N_BLOCKS * KV_BLOCK)
    tensors = model_tensors(header, cfg)
    partition = Partition(cfg, tensors, Grid(tp=world.size), weights)
    sharding, index = partition.of(world.rank)
    backend = CpuBackend(threads)
    loaded, _ = load_weights(header.paths, tensors, sharding, index, backend)
    sizes = partition.n_head_kv(world.rank), N_BLOCKS * KV_BLOCK, kv_type, kv_type
    return Runner(cfg, loaded, Ops(backend, world.group()), *sizes, sharding.blocks, graphs=graphs)


def schedule(rng, n_vocab, n_steps):
    """Return batches of three sequences that begin, decode in changing company and order, and take in more."""
    blocks = rng.permutation(N_BLOCKS).reshape(3, -1)
    lengths, batches = np.zeros(3, int), []
    for step in range(n_steps):
        if step < 3:
            parts = [(step, int(rng.integers(1, 230)))]
        else:
            longest = 12 if rng.random() < 0.1 else 1
            parts = [(i, int(rng.integers(1, longest + 1))) for i in rng.permutation(3)[: rng.integers(1, 4)]]
        positions = np.concatenate([np.arange(lengths[i], lengths[i] + n) for i, n in parts]).astype("i4")
        for i, n in parts:
            lengths[i] += n
        counts = np.array([n for _, n in parts], "i4")
        width = max(-(-lengths[i] // KV_BLOCK) for i, _ in parts)
        rows = rng.permutation(np.cumsum(counts) - 1).astype("i4")[: rng.integers(0, len(parts) + 1)]
        tokens = rng.integers(0, n_vocab, len(positions)).astype("i4")
        batches.append(Batch(tokens, positions, counts, np.array([blocks[i, :width] for i, _ in parts], "i4"), rows))
    return batches


@pytest.fixture
def calls(monkeypatch):
    """The batches for which a model text was run, on any rank."""
    found, forward = [], mpillama.runner.forward

    def counted(*args):
        found.append(args[4])
        return forward(*args)

    monkeypatch.setattr("mpillama.runner.forward", counted)
    return found


def same_bits(path, batches, weights, **options):
    """Run batches with and without recordings on ranks of these weights, and compare what each rank gets."""

    def main(world):
        plain, recorded = (open_on(world, path, graphs, weights, **options) for graphs in (False, True))
        # Results are looked at in the end: they must not change with later steps.
        return [[runner.run(batch) for batch in batches] for runner in (plain, recorded)]

    for expected, got in run_threads(len(weights), main):
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_array_equal(a.view("u4"), b.view("u4"))


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_played_steps_give_the_same_bits(weights, kv_type, tmp_path, rng, calls):
    type = [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.F32][int(rng.integers(3))]
    path = write_llama(tmp_path / "m.gguf", rng, type, n_embd=192, n_head=6, n_head_kv=3, n_head_dim=32, n_layer=2)
    batches = schedule(rng, 96, 60)
    same_bits(path, batches, weights, kv_type=kv_type)
    # One runner ran the text each time, the other one played most steps.
    assert len(calls) < 1.8 * len(weights) * len(batches)


@pytest.mark.parametrize(
    ("name", "played"),
    [
        ("qwen3-dense", True),
        ("gemma2-dense", True),
        ("gemma3-dense", True),
        ("phi3-dense", True),
        ("granite-dense", True),
        ("olmo2-dense", True),
        ("qwen2-dense", True),
        ("llama-moe", False),
        ("gpt-oss-moe", False),
    ],
)
def test_architectures(name, played, rng, calls):
    """Dense models are played; what cannot be recorded runs as text."""
    path = shared("golden", f"{name}.gguf")
    n_vocab = len(np.load(shared("golden", f"{name}.npz"))["logits"][0])
    batches = schedule(rng, n_vocab, 30)
    same_bits(path, batches, (1.0,))
    assert (len(calls) < 2 * len(batches)) == played


def test_large_steps_are_not_kept(tmp_path, rng, calls, monkeypatch):
    path = write_llama(tmp_path / "m.gguf", rng)
    batches = schedule(rng, 96, 60)
    monkeypatch.setattr("mpillama.backends.cpu.steps._MAX_BYTES", 1000)
    same_bits(path, batches, (1.0,))
    assert len(calls) == 2 * len(batches)
