"""Ranks of one job on different devices: who gets which, the same numbers on all, and the right ones."""

from argparse import Namespace

import numpy as np
import pytest
from test_golden import MODELS

from gpu_host import needs_compiler
from mpillama.backends import make_backend
from mpillama.backends.base import Batch
from mpillama.backends.reference import ReferenceBackend
from mpillama.cli.devices import device_table, devices_of
from mpillama.cli.memory import WORKSPACE, fit_memory
from mpillama.comm.threads import run_threads
from mpillama.errors import PeerFailure, UsageError, UserError
from mpillama.gguf.types import GGMLType
from mpillama.grid import Grid
from shared import shared
from tiny import nmse, open_runner, run_on, write_llama

KINDS = ("cpu", "emulated", "reference")


def makers(rng):
    """Return a maker for each rank, in a random order of backends."""
    return [lambda name=name: make_backend(name) for name in rng.permutation(KINDS)]


@needs_compiler
@pytest.mark.parametrize("name", MODELS)
def test_golden_logits(name, rng):
    reference = np.load(shared("golden", f"{name}.npz"))
    path, tokens = shared("golden", f"{name}.gguf"), reference["tokens"].tolist()
    results = run_on(path, tokens, [5.0, 2.0, 1.0], 11, make=makers(rng))
    assert nmse(results[0], reference["logits"]) <= 1e-6
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), results[0].view(np.uint32))


@needs_compiler
@pytest.mark.parametrize(("grid", "experts"), [(Grid(1, 3), "off"), (Grid(3), "on")])
def test_stages_and_whole_experts(grid, experts, rng, tmp_path):
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, n_layer=3, n_expert=7, n_expert_used=3, n_ff=64)
    tokens = rng.integers(0, 96, 9).tolist()
    exact = run_on(path, tokens, [1.0])[0]
    result = run_on(path, tokens, [1.0] * 3, 4, make=makers(rng), grid=grid, experts=experts)[0]
    assert nmse(result, exact) <= 1e-6


class Contrary(ReferenceBackend):
    """Takes the last of experts that are equally likely, as rounding may do on another device."""

    def route(self, logits, n_used, gating, normalize):
        index, weights = super().route(logits[:, ::-1], n_used, gating, normalize)
        return logits.shape[1] - 1 - index, weights


class Flat(ReferenceBackend):
    """Finds all experts equally likely."""

    def route(self, logits, n_used, gating, normalize):
        return super().route(np.zeros_like(logits), n_used, gating, normalize)


class FlatAndContrary(Contrary, Flat):
    pass


def test_ranks_that_would_choose_different_experts_take_those_of_the_first(rng, tmp_path):
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, n_expert=8, n_expert_used=2, n_ff=64)
    tokens = rng.integers(0, 96, 9).tolist()
    for first, other in ((Flat, FlatAndContrary), (FlatAndContrary, Flat)):
        exact = run_on(path, tokens, [1.0], make=first)[0]
        assert nmse(run_on(path, tokens, [1.0], make=other)[0], exact) > 1e-4
        assert nmse(run_on(path, tokens, [2.0, 1.0, 1.0], 4, make=[first, other, other])[1], exact) <= 1e-8


@needs_compiler
def test_hidden_states_are_the_same_bits(rng):
    """A norm is the last op of embeddings, and each rank does it for itself."""
    tokens = rng.integers(0, 128, 20).astype(np.int32)
    make = makers(rng)

    def main(world):
        runner, _ = open_runner(world, shared("golden", "gemma2-dense.gguf"), [1.0] * 3, make=make)
        table = np.arange(runner.n_blocks, dtype=np.int32)[None]
        lengths = np.array([20], np.int32)
        return runner.run(Batch(tokens, np.arange(20, dtype=np.int32), lengths, table, tokens * 0 + 3, embedding=True))

    results = run_threads(3, main)
    for other in results[1:]:
        np.testing.assert_array_equal(other.view(np.uint32), results[0].view(np.uint32))


def chosen(hosts, backend="auto", device=None):
    return devices_of(Namespace(backend=backend, device=device), hosts.split())


def test_a_list_is_for_ranks_or_for_ranks_of_a_host():
    assert chosen("a a b", "cpu,emulated,reference") == [("cpu", None), ("emulated", None), ("reference", None)]
    assert chosen("a a b b", device="cuda:1,cpu") == [("cuda", 1), ("auto", None)] * 2
    assert chosen("a b a b a", device="hip,hip:3") == [*[("hip", None)] * 2, *[("hip", 3)] * 2, ("hip", None)]
    assert chosen("a a a") == [("auto", None)] * 3
    for hosts, text, words in (
        ("a", "cpu,cpu", "but there is 1 rank: "),
        ("a a b b", "cpu,cpu,cpu", "but there are 4 ranks, at most 2 on a host: "),
        ("a a", "cpu,cuda:1,cpu", "-dev cpu,cuda:1,cpu names 3 devices, but there are 2 ranks: "),
    ):
        with pytest.raises(UsageError, match=words):
            chosen(hosts, device=text)


def test_each_device_has_its_own_memory(monkeypatch):
    """Two ranks share a host's memory, the third has a GPU; only what is too small is named."""
    monkeypatch.setattr("mpillama.cli.memory.available_memory", lambda: 10 << 30)

    def fit(world, weights, gpu):
        return fit_memory(world, weights, [1 << 30] * 3, 4096, 4096, gpu if world.rank == 1 else 0)

    def main(world, weights, gpu, words):
        with pytest.raises(PeerFailure if world.rank else UserError, match=words):
            fit(world, weights, gpu)

    gib = 1 << 30
    assert gib > WORKSPACE
    assert run_threads(3, lambda world: fit(world, [3 * gib, 20 * gib, 4 * gib], 30 * gib)) == [4096] * 3
    told = r"^the GPU of rank 1 on threads has 20\.00 GiB free, but it needs .*use more GPUs"
    run_threads(3, lambda world: main(world, [3 * gib, 20 * gib, 4 * gib], 20 * gib, told))
    told = r"^threads has 10\.00 GiB free, but its ranks need 11\.25 GiB .*use more hosts"
    run_threads(3, lambda world: main(world, [5 * gib, 20 * gib, 6 * gib], 30 * gib, told))


def test_list_of_devices_without_gpus_has_the_cpu(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cupy", None)
    head, cpu = device_table().splitlines()
    assert head == "Available devices:"
    assert cpu.startswith("  cpu: ")
    assert cpu.endswith(" MiB free)")
