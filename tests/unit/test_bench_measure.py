"""What bench counts and times: collectives of known models, steps, bytes, tokens per second."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace

import numpy as np
import pytest

from mpillama.backends.reference import ReferenceBackend
from mpillama.bench.measure import MeteredRunner, RankSteps, Workload, figures, spread
from mpillama.bench.model import StepBytes, describe, load, step_bytes
from mpillama.bench.plan import Test
from mpillama.bench.stream import stream_gbps
from mpillama.comm.base import World
from mpillama.comm.metered import MeteredGroup
from mpillama.comm.solo import SoloGroup
from mpillama.comm.threads import run_threads
from mpillama.errors import UsageError
from mpillama.layout import split
from mpillama.ops import Ops
from mpillama.runner import pack, unpack
from mpillama.sharding import Sharding
from tiny import write_llama


def open_metered(world: World, path, n_ctx: int = 128) -> MeteredRunner:
    backend = ReferenceBackend()
    model = describe(str(path), str(path), (), world.size, n_ctx, backend)
    sharding = Sharding(model.cfg, model.shares)
    weights = load(model, sharding, world.rank, backend, lambda n: None)
    group = MeteredGroup(world.group())
    n_head_kv = sharding.cuts["k"].width(world.rank) // model.cfg.n_embd_head_k
    return MeteredRunner(model.cfg, weights, Ops(backend, group), n_head_kv, n_ctx, "f32", "f32", group=group)


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4])
def test_collectives_of_a_known_model(n_ranks, tmp_path, rng):
    n_layer, n_embd, n_vocab = int(rng.integers(1, 4)), 64, int(rng.integers(8, 50))
    path = write_llama(
        tmp_path / "m.gguf",
        rng,
        n_layer=n_layer,
        n_embd=n_embd,
        n_vocab=n_vocab,
        n_head=4,
        n_head_kv=4,
        n_head_dim=16,
        n_ff=64,
    )
    n_prompt, n_gen = int(rng.integers(5, 20)), int(rng.integers(1, 5))

    def main(world: World) -> RankSteps:
        runner = open_metered(world, path)
        work = Workload(lambda batch: runner.run(unpack(pack(batch))), runner.n_blocks, n_vocab, lambda: False)
        work.test(Test(n_prompt, n_gen), 8, 3)
        steps = runner.take()
        assert runner.take() == RankSteps()
        return steps

    # 8 tokens a batch in ubatches of 3; only a batch's last token has logits.
    n_tokens, n_logits = [], []
    for start in range(0, n_prompt, 8):
        left = min(8, n_prompt - start)
        while left:
            n_tokens.append(min(3, left))
            left -= n_tokens[-1]
            n_logits.append(int(left == 0))
    n_tokens, n_logits = n_tokens + [1] * n_gen, n_logits + [1] * n_gen
    found = run_threads(n_ranks, main)
    # Each step reads what the context holds after it: 4 heads of 16 float32, keys and values, in each block.
    n_read = sum(itertools.accumulate(n_tokens))
    assert sum(steps.kv_bytes for steps in found) == n_read * n_layer * 4 * 2 * 16 * 4
    for steps in found:
        assert (steps.n_tokens, steps.n_logits) == (n_tokens, n_logits)
        assert len(steps.total_ns) == len(steps.comm_ns) == len(n_tokens)
        assert all(0 <= comm <= total for comm, total in zip(steps.comm_ns, steps.total_ns, strict=True))
        if n_ranks == 1:
            assert (steps.comm_calls, steps.comm_bytes, sum(steps.comm_ns)) == (0, 0, 0)
            continue
        # The embedding, attention and feed-forward network of each block, and the logits.
        assert steps.comm_calls == len(n_tokens) * (1 + 2 * n_layer + 1)
        # The last block goes on with the tokens whose logits are wanted.
        rows = sum(n_tokens) * (1 + 2 * (n_layer - 1)) + 2 * sum(n_logits)
        assert steps.comm_bytes == 4 * (rows * n_embd + sum(n_logits) * n_vocab)


def test_metered_group_changes_nothing(rng):
    arrays = [rng.standard_normal((3, 5)).astype(np.float32) for _ in range(3)]
    cut = split(15, [1.0] * 3)

    def main(world: World):
        plain, metered = world.group(), MeteredGroup(world.group())
        assert (metered.rank, metered.size, metered.leader) == (plain.rank, plain.size, plain.leader)
        x = arrays[world.rank]
        assert (metered.allreduce(x.copy()) == plain.allreduce(x.copy())).all()
        assert (metered.allgather(x, cut) == plain.allgather(x, cut)).all()
        traffic = metered.take()
        assert (traffic.calls, traffic.nbytes) == (2, 60 + 180)
        assert traffic.ns > 0
        assert metered.take().calls == 0

    run_threads(3, main)
    assert MeteredGroup(SoloGroup()).leader


def test_a_workload_that_is_stopped_ends(tmp_path, rng):
    seen = []
    work = Workload(seen.append, 8, 50, lambda: len(seen) >= 3)
    work.test(Test(20, 5), 20, 4)
    assert [len(batch.tokens) for batch in seen] == [4, 4, 4]


def test_workload_goes_on_after_the_depth(rng):
    seen = []
    work = Workload(seen.append, 8, 50, lambda: False)
    work.test(Test(6, 2, n_depth=100), 4, 4)
    assert [batch.positions.tolist() for batch in seen] == [[100, 101, 102, 103], [104, 105], [106], [107]]
    assert all(batch.tokens.min() >= 0 and batch.tokens.max() < 50 for batch in seen)
    assert [batch.block_tables.shape[1] for batch in seen] == [4] * 4


def test_sequences_of_a_workload_have_blocks_of_their_own():
    seen = []
    work = Workload(seen.append, 8, 50, lambda: False)
    work.test(Test(3, 2, n_depth=40, n_parallel=3), 8, 5)
    assert [batch.positions.tolist() for batch in seen] == [
        [40, 41, 42, 40, 41],
        [42, 40, 41],
        [42],
        [43, 43, 43],
        [44, 44, 44],
    ]
    assert [batch.seq_lens.tolist() for batch in seen] == [[3, 2], [1, 2], [1], [1, 1, 1], [1, 1, 1]]
    assert [batch.logit_rows.tolist() for batch in seen] == [[2], [0, 2], [0], [0, 1, 2], [0, 1, 2]]
    assert [batch.block_tables.tolist() for batch in seen] == [
        [[0, 1], [2, 3]],
        [[2, 3], [4, 5]],
        [[4, 5]],
        [[0, 1], [2, 3], [4, 5]],
        [[0, 1], [2, 3], [4, 5]],
    ]


def test_figures_are_consistent(rng):
    n_ranks, n_reps, n_steps, n_tokens = 3, 4, 6, 12
    total = rng.integers(10**6, 10**7, (n_reps, n_ranks, n_steps))
    comm = rng.integers(0, 10**6, (n_reps, n_ranks, n_steps))
    kernels = rng.integers(0, total - comm)
    repetitions = [
        [
            RankSteps(
                total[i, r].tolist(),
                comm[i, r].tolist(),
                [2] * n_steps,
                [1] * n_steps,
                30,
                600,
                40,
                kernels[i, r].tolist(),
            )
            for r in range(n_ranks)
        ]
        for i in range(n_reps)
    ]
    samples = [int(total[i, 0].sum()) + 5000 * n_tokens for i in range(n_reps)]
    found = figures(n_tokens, samples, repetitions, StepBytes(700, 300, 0, 0, 0))
    assert found.samples_ns == tuple(samples)
    assert found.samples_ts == pytest.approx([n_tokens / (ns / 1e9) for ns in samples])
    assert found.avg_ns == round(statistics.mean(samples))
    assert found.avg_ts == pytest.approx(np.mean(found.samples_ts))
    # The mean of the rates is never below the rate of the mean time, and close to it while the spread is small.
    slow = n_tokens / (found.avg_ns / 1e9)
    assert slow * (1 - 1e-6) <= found.avg_ts < slow * (1 + 2 * (found.stddev_ns / found.avg_ns) ** 2 + 1e-6)
    assert found.stddev_ts == pytest.approx(np.std(found.samples_ts, ddof=1))
    assert found.comm_us == pytest.approx(comm.sum(axis=(0, 2)).mean() / (n_reps * n_tokens) / 1e3)
    assert found.comm_min_us == pytest.approx(comm.min(axis=1).sum() / (n_reps * n_tokens) / 1e3)
    assert found.comm_calls == pytest.approx(30 / n_tokens)
    assert found.comm_bytes == pytest.approx(600 / n_tokens)
    busy = total - comm
    assert found.skew_us == pytest.approx((busy.max(axis=1) - busy.min(axis=1)).mean() / 1e3)
    assert found.host_us == pytest.approx((busy - kernels).sum(axis=(0, 2)).mean() / (n_reps * n_tokens) / 1e3)
    uncounted = [[replace(steps, kernel_ns=[]) for steps in ranks] for ranks in repetitions]
    assert figures(n_tokens, samples, uncounted, StepBytes(1, 1, 0, 0, 0)).host_us is None
    assert found.overhead_us == pytest.approx(5.0)
    assert found.weight_bytes == pytest.approx(1000 * n_steps / n_tokens)
    assert found.kv_bytes == pytest.approx(n_ranks * 40 / n_tokens)
    n_bytes = (found.weight_bytes + found.kv_bytes) * n_tokens * n_reps
    assert found.read_gbps == pytest.approx(n_bytes / sum(samples))
    one = figures(n_tokens, samples[:1], repetitions[:1], StepBytes(1, 1, 0, 0, 0))
    assert (one.stddev_ns, one.stddev_ts) == (0, 0.0)
    assert one.avg_ts == pytest.approx(n_tokens / (one.avg_ns / 1e9))
    assert spread([3.0]) == 0.0


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_bytes_that_a_token_reads(n_ranks, tied, tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, tied=tied, n_head=6, n_head_kv=6)
    model = describe("m", str(path), (), n_ranks, 128, ReferenceBackend())
    reads = step_bytes(model, Sharding(model.cfg, model.shares))
    embd = model.tensors["token_embd.weight"].nbytes
    whole = sum(info.nbytes for info in model.tensors.values()) - embd
    norms = sum(info.nbytes for info in model.tensors.values() if "norm" in info.name)
    assert reads.of(1, 1) == reads.of(9, 1) == whole + (n_ranks - 1) * norms
    assert reads.of(5, 0) == reads.of(1, 1) - embd
    assert (model.size, model.n_params * 4) == (whole + embd * (not tied), whole + embd * (not tied))


def test_experts_are_read_as_far_as_they_are_chosen(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, n_expert=8, n_expert_used=2, n_layer=1)
    model = describe("m", str(path), (), 1, 128, ReferenceBackend())
    reads = step_bytes(model, Sharding(model.cfg, model.shares))
    experts = sum(info.nbytes for info in model.tensors.values() if "_exps" in info.name)
    assert reads.experts == experts
    assert reads.of(1, 1) == pytest.approx(reads.blocks + reads.head + experts / 4)
    # Against tokens that choose at random.
    chosen = [len(np.unique([rng.permutation(8)[:2] for _ in range(4)])) for _ in range(4000)]
    assert reads.of(4, 0) == pytest.approx(reads.blocks + experts * np.mean(chosen) / 8, rel=0.02)


def test_shares_for_another_number_of_ranks(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng)
    with pytest.raises(UsageError, match="-ts 3 gives 1 of 2 ranks a share"):
        describe("m", str(path), (3.0,), 2, 128, ReferenceBackend())


def test_stream_is_measured_or_asked_for():
    class Own(ReferenceBackend):
        def stream_gbps(self, n_threads: int, n_bytes: int) -> float:
            return 10.0 * n_threads

    assert stream_gbps(Own(), 3, 1) == 30.0
    assert 0.05 < stream_gbps(ReferenceBackend(), 2, 16, seconds=0.05) < 5000
