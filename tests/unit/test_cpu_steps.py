"""Steps of the cpu backend that are recorded and played: the same bits as without, whatever comes between."""

from functools import partial

import numpy as np
import pytest

from mpillama.backends.base import KV_BLOCK
from mpillama.comm.threads import run_threads
from mpillama.gguf.types import GGMLType
from shared import shared
from step_cases import schedule
from tiny import open_runner, write_llama

pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.backend import CpuBackend

N_BLOCKS = 48


def same_bits(path, batches, weights, kv_type="f16"):
    """Run batches with and without recordings on ranks of these weights, and compare what each rank gets."""

    def main(world):
        n_ctx, make = N_BLOCKS * KV_BLOCK, partial(CpuBackend, 2)
        plain, recorded = (
            open_runner(world, path, weights, n_ctx, kv_type, make, graphs=graphs)[0] for graphs in (False, True)
        )
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
    batches = schedule(rng, 96, 60, N_BLOCKS, 230, some_rows=True)
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
    batches = schedule(rng, n_vocab, 30, N_BLOCKS, 230, some_rows=True)
    same_bits(path, batches, (1.0,))
    assert (len(calls) < 2 * len(batches)) == played


def test_large_steps_are_not_kept(tmp_path, rng, calls, monkeypatch):
    path = write_llama(tmp_path / "m.gguf", rng)
    batches = schedule(rng, 96, 60, N_BLOCKS, 230, some_rows=True)
    monkeypatch.setattr("mpillama.backends.cpu.steps._MAX_BYTES", 1000)
    same_bits(path, batches, (1.0,))
    assert len(calls) == 2 * len(batches)
