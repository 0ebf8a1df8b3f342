"""A request's tokens do not depend on its company: in a crowd, preempted, from the prefix cache, on 1 and 3 ranks."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillama.backends import make_backend
from mpillama.backends.base import KV_BLOCK, Backend, Batch
from mpillama.backends.reference import ReferenceBackend
from mpillama.comm.base import World
from mpillama.comm.solo import SoloWorld
from mpillama.comm.threads import run_threads
from mpillama.engine.base import Stats
from mpillama.engine.embedding import pooling_type
from mpillama.engine.engine import Engine
from mpillama.engine.request import Request, RequestParams
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import ModelError
from mpillama.gguf.reader import read_header
from mpillama.grid import Grid
from mpillama.runner import Runner, pack, unpack
from mpillama.steps import Leader, follow
from shared import shared
from tiny import logits_of, nmse, open_runner, write_llama

N_VOCAB, N_CTX, N_TOKENS = 96, 128, 8
GREEDY = SamplingParams(temp=0.0)


def backends() -> list[Any]:
    found = [pytest.param(ReferenceBackend, id="reference")]
    try:
        from mpillama import _cpu  # noqa: F401
    except ImportError:
        return found
    return [*found, pytest.param(functools.partial(make_backend, "cpu", 2, (), ""), id="cpu")]


def on_ranks(n_ranks: int, path: Path, make: Callable[[], Backend], n_kv: int, work: Callable[[Leader, Runner], Any]):
    """Return what ``work`` gives on rank 0, while the other ranks follow."""

    def main(world: World) -> Any:
        runner, _ = open_runner(world, path, [1.0] * n_ranks, n_kv, make=make)
        if world.rank:
            return follow(world, runner)
        leader = Leader(world, runner)
        result = work(leader, runner)
        leader.stop()
        return result

    return run_threads(n_ranks, main)[0]


def generate(
    leader: Leader, runner: Runner, prompts: Sequence[Sequence[int]], repeat: int = 1, **options: Any
) -> tuple[list[list[int]], Stats]:
    """Return the greedy tokens of each prompt, all asked for at once; of the last time if that is repeated."""
    engine = Engine(leader, None, N_VOCAB, N_CTX, runner.n_blocks, **options)
    for time in range(repeat):
        tokens: dict[str, list[int]] = {f"{time}-{i}": [] for i in range(len(prompts))}
        for id, prompt in zip(tokens, prompts, strict=True):
            engine.add(Request(id, tuple(prompt), RequestParams(sampling=GREEDY, max_tokens=N_TOKENS)))
        while engine.has_work():
            for output in engine.step():
                tokens[output.request_id] += output.tokens
    return list(tokens.values()), engine.stats()


@pytest.mark.parametrize("make", backends())
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_greedy_tokens_do_not_depend_on_company(n_ranks, make, tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_head_dim=16, n_embd=64, n_ff=96)
    stem = rng.integers(0, N_VOCAB, 70).tolist()
    # The first are about to need a second KV block each, of which the small cache has too few.
    prompts = [rng.integers(0, N_VOCAB, int(n)).tolist() for n in (*[KV_BLOCK - 1] * 6, *rng.integers(1, 60, 10))]
    prompts += [[*stem[: int(n)], int(rng.integers(N_VOCAB))] for n in rng.integers(20, 70, 16)]
    runner, _ = open_runner(SoloWorld(), path, [1.0], make=make)

    def check(found: list[list[int]]) -> None:
        """Each token is the likeliest after what is before it, for the prompt alone and evaluated at once."""
        for prompt, tokens in zip(prompts, found, strict=True):
            assert len(tokens) == N_TOKENS
            logits = logits_of(runner, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
            # Sums are rounded otherwise in other company, so of two that are equal but for that either may win.
            assert (logits.max(axis=1) - logits[range(N_TOKENS), tokens] < 1e-4 * logits.std()).all(), prompt

    crowd, stats = on_ranks(
        n_ranks, path, make, 4096, lambda *a: generate(*a, prompts, n_parallel=32, n_batch=100, repeat=2)
    )
    check(crowd)
    assert stats.preemptions == 0
    assert stats.cached_tokens >= sum((len(prompt) - 1) // KV_BLOCK * KV_BLOCK for prompt in prompts) > 0
    packed, stats = on_ranks(n_ranks, path, make, 160, lambda *a: generate(*a, prompts, n_parallel=8, n_batch=30))
    check(packed)
    assert stats.preemptions > 0
    assert stats.kv_used == 0
    alone, _ = on_ranks(n_ranks, path, make, 160, lambda *a: generate(*a, prompts[::4], n_parallel=1))
    assert sum(a != b for a, b in zip(alone, crowd[::4], strict=True)) <= 1


class CountingLeader(Leader):
    """Notes how many batches were in flight with each that was submitted."""

    def submit(self, batch: Batch) -> None:
        super().submit(batch)
        self.seen = [*getattr(self, "seen", []), self.in_flight]


@pytest.mark.parametrize("n_stages", [2, 3])
def test_sequences_keep_a_pipeline_busy(n_stages, tmp_path, rng):
    """As many steps in flight as there are stages, of other sequences each, and the tokens of a single rank."""
    path = write_llama(tmp_path / "m.gguf", rng, n_layer=3)
    prompts = [rng.integers(0, N_VOCAB, int(n)).tolist() for n in (*rng.integers(1, 20, 7), 90)]

    def main(world: World) -> Any:
        runner, _ = open_runner(world, path, [1.0] * n_stages, 512, grid=Grid(1, n_stages))
        if world.rank:
            return follow(world, runner)
        leader = CountingLeader(world, runner, n_stages)
        result = generate(leader, runner, prompts, n_parallel=6, n_batch=30)[0]
        leader.stop()
        return result, leader.seen

    found, in_flight = run_threads(n_stages, main)[0]
    assert max(in_flight) == n_stages
    assert np.mean(np.array(in_flight) == n_stages) > 0.5
    runner, _ = open_runner(SoloWorld(), path, [1.0])
    for prompt, tokens in zip(prompts, found, strict=True):
        logits = logits_of(runner, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
        assert (logits.max(axis=1) - logits[range(N_TOKENS), tokens] < 1e-4 * logits.std()).all(), prompt


@pytest.mark.parametrize("make", backends())
def test_continuations_share_the_prompt_and_then_part(make, tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_head_dim=16, n_embd=64, n_ff=96)
    prompt = tuple(rng.integers(0, N_VOCAB, 45).tolist())
    runner, _ = open_runner(SoloWorld(), path, [1.0], 512, make=make)
    engine = Engine(runner.run, None, N_VOCAB, N_CTX, runner.n_blocks, n_parallel=4)
    sampling = SamplingParams(seed=int(rng.integers(1 << 30)), temp=5.0, samplers=("temperature",))
    engine.add(Request("a", prompt, RequestParams(sampling=sampling, n=4, max_tokens=30, logprobs=0)))
    found: list[list[Any]] = [[] for _ in range(4)]
    while engine.has_work():
        for output in engine.step():
            found[output.index] += output.logprobs
    assert engine.stats().copied_blocks == 3
    assert len({tuple(logprob.token for logprob in branch) for branch in found}) == 4
    for branch in found:
        tokens = [logprob.token for logprob in branch]
        logits = logits_of(runner, [*prompt, *tokens])[len(prompt) - 1 : -1].astype(np.float64)
        exact = logits[range(30), tokens] - np.log(np.exp(logits).sum(axis=1))
        assert [logprob.logprob for logprob in branch] == pytest.approx(exact.tolist(), abs=1e-4)


@pytest.mark.parametrize("make", backends())
@pytest.mark.parametrize("n_ranks", [1, 3])
def test_embedding_is_the_mean_of_the_hidden_states(n_ranks, make, tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_head_dim=16, n_embd=64, n_ff=96)
    prompt = tuple(rng.integers(0, N_VOCAB, 50).tolist())
    runner, _ = open_runner(SoloWorld(), path, [1.0])
    rows = np.arange(50, dtype=np.int32)
    tables = np.arange(runner.n_blocks, dtype=np.int32)[None]
    batch = Batch(np.array(prompt, np.int32), rows, np.array([50], np.int32), tables, rows, embedding=True)
    hidden = runner.run(unpack(pack(batch)))
    info = read_header(path).tensors["output.weight"]
    output = np.fromfile(path, np.float32, N_VOCAB * 64, offset=info.offset).reshape(N_VOCAB, 64)
    assert nmse(hidden @ output.T, logits_of(runner, prompt)) < 1e-9
    means = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}

    def embed(leader: Leader, runner: Runner, n_batch: int, pooling: str) -> np.ndarray:
        engine = Engine(
            leader.run, None, N_VOCAB, N_CTX, runner.n_blocks, n_batch=n_batch, n_parallel=3, pooling=pooling
        )
        for i, embedding in enumerate((False, True, False)):
            engine.add(Request(str(i), prompt, RequestParams(sampling=GREEDY, max_tokens=5, embedding=embedding)))
        outputs = []
        while engine.has_work():
            outputs += engine.step()
        (found,) = [output.embedding for output in outputs if output.embedding is not None]
        assert sum(len(output.tokens) for output in outputs) == 10
        return found

    for n_batch, pooling in ((7, "mean"), (512, "mean"), (9, "cls"), (9, "last")):
        found = on_ranks(n_ranks, path, make, 512, lambda *a, n=n_batch, p=pooling: embed(*a, n, p))
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, means[pooling] / np.linalg.norm(means[pooling]), atol=2e-6)


def test_pooling_type_of_a_file():
    names = [pooling_type({"general.architecture": "llama", "llama.pooling_type": n}) for n in range(4)]
    assert names == ["mean", "mean", "cls", "last"]
    assert pooling_type({"general.architecture": "llama", "other.pooling_type": 3}) == "mean"
    with pytest.raises(ModelError, match="pooling_type 4"):
        pooling_type({"general.architecture": "llama", "llama.pooling_type": 4})


def test_wire_format_keeps_a_batch(rng):
    def ints(*shape: int) -> np.ndarray:
        return rng.integers(-1, 1 << 20, shape).astype(np.int32)

    for n_copies, embedding in ((0, False), (3, True), (1, False)):
        batch = Batch(ints(7), ints(7), ints(3), ints(3, 5), ints(2), ints(n_copies, 2), embedding)
        again = unpack(pack(batch))
        for name in ("tokens", "positions", "seq_lens", "block_tables", "logit_rows", "copies"):
            np.testing.assert_array_equal(getattr(again, name), getattr(batch, name))
            assert getattr(again, name).dtype == np.int32
        assert again.embedding is embedding


def test_a_trained_model_writes_its_text_in_any_company():
    import json

    path = shared("models", "stories260K", "stories260K-f32.gguf")
    expected = json.loads(shared("models", "stories260K", "reference.json").read_text())
    n = min(40, len(expected["greedy_ids"]))
    runner, _ = open_runner(SoloWorld(), path, [1.0], 96)
    engine = Engine(runner.run, None, runner.cfg.n_vocab, 256, runner.n_blocks, n_batch=16, n_parallel=6)
    for i in range(6):
        prompt = expected["prompt_ids"][: 2 + i] if i else expected["prompt_ids"]
        engine.add(Request(str(i), tuple(prompt), RequestParams(sampling=GREEDY, max_tokens=n)))
    tokens: list[int] = []
    while engine.has_work():
        tokens += [token for output in engine.step() if output.request_id == "0" for token in output.tokens]
    assert tokens == expected["greedy_ids"][:n]
