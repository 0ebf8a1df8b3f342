"""Random schedules against a cache of token ids: whatever happens, each sequence sees its own tokens and nothing else.

The "model" here keeps in each slot of a KV block a hash of its token and of the slot before, found through the block
table, as real keys and values depend on all tokens before them; its logits come from a hash of all slots. A wrong
block, a missing copy or a stale prefix therefore gives other tokens than the same request alone.
"""

from __future__ import annotations

import dataclasses
import os
import zlib
from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from mpillama.backends.base import Batch
from mpillama.backends.reference import ReferenceBackend
from mpillama.engine.engine import Engine
from mpillama.engine.request import Output, Request, RequestParams
from mpillama.engine.sampling.chain import Sampler
from mpillama.engine.sampling.params import SamplingParams

N_VOCAB = 24
N_SCHEDULES = int(os.environ.get("MPILLAMA_FUZZ", "500"))
PARTS = 4
MIX = (np.arange(1, N_VOCAB + 1, dtype=np.uint64) * np.uint64(2654435761)).astype(np.uint32)


def logits_of(digest: int) -> np.ndarray:
    """Return logits that depend on every token so far, through their CRC."""
    mixed = (MIX ^ np.uint32(digest)) * np.uint32(2246822519)
    return (mixed >> 16).astype(np.float32) / np.float32(16384)


def slot_of(token: int, before: int) -> int:
    """Return what is kept of a token after a slot; 0 before the first."""
    return zlib.crc32(token.to_bytes(4, "little"), before) & 0x7FFFFFFF


def digest_of(slots: Sequence[int], before: int = 0) -> int:
    return zlib.crc32(np.array(slots, np.int32).tobytes(), before)


def digests_of(tokens: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield for each token its slot, and the digest of all slots so far."""
    slot = digest = 0
    for token in tokens:
        slot = slot_of(token, slot)
        digest = digest_of([slot], digest)
        yield slot, digest


def logprob_of(logits: np.ndarray, token: int) -> float:
    return float(logits[token]) - float(np.log(np.exp(logits.astype(float)).sum()))


class FakeModel:
    """Keeps slots in KV blocks, and poison where nobody has written."""

    def __init__(self, n_blocks: int, size: int, n_batch: int, n_parallel: int) -> None:
        self.cache = np.full((n_blocks, size), -1, np.int32)
        self.size, self.n_batch, self.n_parallel, self.n_runs = size, n_batch, n_parallel, 0

    def __call__(self, batch: Batch) -> np.ndarray:
        self.n_runs += 1
        assert 1 <= len(batch.tokens) <= self.n_batch
        assert 1 <= len(batch.seq_lens) <= self.n_parallel
        sources, targets = batch.copies[:, 0], batch.copies[:, 1]
        assert len(set(targets.tolist())) == len(targets)
        assert not set(sources.tolist()) & set(targets.tolist())
        self.cache[targets] = self.cache[sources]

        ends = np.cumsum(batch.seq_lens)
        written: list[tuple[int, int]] = []
        for end, n, table in zip(ends.tolist(), batch.seq_lens.tolist(), batch.block_tables, strict=True):
            first = int(batch.positions[end - n])
            slot = int(self.cache[table[(first - 1) // self.size], (first - 1) % self.size]) if first else 0
            for t in range(end - n, end):
                position = int(batch.positions[t])
                assert position == first + t - (end - n)
                block = int(table[position // self.size])
                assert block >= 0
                slot = slot_of(int(batch.tokens[t]), max(0, slot))
                self.cache[block, position % self.size] = slot
                written.append((block, position % self.size))
        assert len(set(written)) == len(written)

        result = []
        for row in batch.logit_rows.tolist():
            seq = int(np.searchsorted(ends, row, side="right"))
            n_seen = int(batch.positions[row]) + 1
            seen = self.cache[batch.block_tables[seq, : -(-n_seen // self.size)]].ravel()[:n_seen]
            result.append(logits_of(digest_of(seen)))
        return np.array(result, np.float32).reshape(-1, N_VOCAB)


class Pipeline:
    """Gives results late: several batches may be under way."""

    def __init__(self, model: FakeModel, max_in_flight: int, n_top: int) -> None:
        self.model, self.max_in_flight, self.n_tops = model, max_in_flight, tuple(range(1, n_top + 1))
        self.results: deque[np.ndarray] = deque()

    def submit(self, batch: Batch) -> None:
        assert len(self.results) < self.max_in_flight
        logits = self.model(batch)
        assert batch.n_top in (0, *self.n_tops)
        self.results.append(ReferenceBackend().top_k(logits, batch.n_top, 0) if batch.n_top else logits)

    def collect(self) -> np.ndarray:
        return self.results.popleft()


def alone(request: Request, index: int, n_ctx: int) -> tuple[list[int], str, float]:
    """Return what a continuation must be: tokens, finish_reason, mean logprob."""
    params = request.params
    sampling = dataclasses.replace(params.sampling, seed=params.sampling.seed + index)
    sampler = Sampler(sampling, N_VOCAB, n_ctx)
    *_, (slot, digest) = digests_of(request.prompt)
    tokens: list[int] = []
    scores: list[float] = []
    if params.max_tokens == 0:
        return tokens, "length", -np.inf
    while True:
        logits = logits_of(digest)
        token = sampler.sample(logits)
        scores.append(logprob_of(logits, token))
        if token in params.stop_tokens:
            return tokens, "stop", float(np.mean(scores))
        tokens.append(token)
        if len(tokens) == params.max_tokens or len(request.prompt) + len(tokens) > n_ctx:
            return tokens, "length", float(np.mean(scores))
        slot = slot_of(token, slot)
        digest = digest_of([slot], digest)


def check_blocks(engine: Engine, model: FakeModel) -> None:
    """Every block is counted once for each user, and is either used, cached or free."""
    blocks, scheduler = engine._blocks, engine._scheduler
    users = [0] * blocks.n_blocks
    for branch in scheduler.running:
        for block in branch.table.tolist():
            users[block] += 1
    assert users == [blocks.users(block) for block in range(blocks.n_blocks)]
    used = {block for block, n in enumerate(users) if n}
    assert blocks.n_used == len(used)
    free = blocks._free
    assert sorted([*used, *blocks._cached, *free]) == list(range(blocks.n_blocks))
    assert all(blocks._names[block] is None for block in free)
    assert {name: block for block, name in enumerate(blocks._names) if name} == blocks._by_name
    assert all(branch._n_blocks == 0 for branch in scheduler.waiting)
    assert sum(branch.weight for branch in scheduler.running) <= engine.n_parallel
    keys = [branch.key for branch in scheduler.running]
    assert keys == sorted(keys)
    awaited = [branch._announced[branch._n_registered - branch._n_known :] for branch in scheduler.running]
    # What nobody computes must not be waited for; what somebody does may be there from another already.
    assert blocks._awaited <= {name for names in awaited for name in names}
    model.cache[free] = -1


class Schedule:
    """One random run."""

    def __init__(self, seed: int) -> None:
        rng = self.rng = np.random.default_rng(seed)
        size, n_blocks = int(rng.integers(1, 5)), int(rng.integers(2, 14))
        n_parallel = int(rng.integers(1, 6))
        n_batch = n_parallel + int(rng.integers(0, 12))
        self.model = FakeModel(n_blocks, size, n_batch, n_parallel)
        n_ctx = int(rng.integers(2, 40))
        self.now = 0.0
        self.depth = int(rng.integers(1, 4))
        self.engine = Engine(
            Pipeline(self.model, self.depth, int(rng.integers(0, 4))),
            None,
            N_VOCAB,
            n_ctx,
            n_blocks,
            n_batch,
            n_parallel,
            block_size=size,
            priority_seconds=float(rng.uniform(0, 20)),
            clock=self.clock,
        )
        self.n_ctx = self.engine.n_ctx
        self.stems = [rng.integers(0, N_VOCAB, self.n_ctx) for _ in range(2)]
        self.waiting = [self.request(i) for i in range(int(rng.integers(1, 8)))]
        self.requests = {request.id: request for request in self.waiting}
        self.outputs: dict[str, list[Output]] = {id: [] for id in self.requests}
        self.cancelled: set[str] = set()

    def clock(self) -> float:
        self.now += 0.01
        return self.now

    def request(self, i: int) -> Request:
        rng = self.rng
        longest = self.n_ctx - 1
        n = min(int(rng.integers(1, longest + 1)), int(rng.integers(1, longest + 1)))
        prompt = self.stems[int(rng.integers(2))][:n].copy()
        if rng.random() < 0.5:
            prompt[int(rng.integers(n)) :] = rng.integers(0, N_VOCAB)
        embedding = bool(rng.random() < 0.1)
        n_best = int(rng.integers(1, self.engine.n_parallel + 1)) if rng.random() < 0.4 and not embedding else 1
        greedy = rng.random() < 0.5
        sampling = SamplingParams(
            seed=int(rng.integers(1 << 30)),
            temp=0.0 if greedy else 1.0,
            top_k=int(rng.integers(0, 4)),
            samplers=("temperature",) if greedy else ("top_k",),
        )
        params = RequestParams(
            sampling=sampling,
            max_tokens=int(rng.integers(0, 12)) if rng.random() < 0.9 else None,
            stop_tokens=frozenset(rng.integers(0, N_VOCAB, int(rng.integers(0, 2))).tolist()),
            n=n_best if rng.random() < 0.8 else int(rng.integers(1, n_best + 1)),
            best_of=n_best,
            priority=int(rng.integers(-2, 3)),
            embedding=embedding,
            prompt_logprobs=0 if rng.random() < 0.2 else None,
            cache_prompt=bool(rng.random() < 0.9),
        )
        return Request(f"r{i}", tuple(prompt.tolist()), params)

    def cancel(self, id: str) -> None:
        outputs = self.engine.cancel(id)
        ended = bool(self.outputs[id]) and self.outputs[id][-1].last
        assert bool(outputs) != ended
        if outputs:
            assert [output.last for output in outputs] == [False] * (len(outputs) - 1) + [True]
            assert all(output.finish_reason == "cancelled" and output.usage for output in outputs)
            self.cancelled.add(id)
            self.outputs[id] += outputs
            check_blocks(self.engine, self.model)

    def run(self) -> None:
        engine, rng = self.engine, self.rng
        # The first in order advances in each step of its kind, and no branch is more steps long than it has tokens.
        tokens_of = [(len(r.prompt) + min(r.params.max_tokens or 99, self.n_ctx), r) for r in self.waiting]
        patience = self.depth * sum(2 * (n + 1) * r.params.n_branches for n, r in tokens_of)
        added: list[str] = []
        while self.waiting or engine.has_work():
            while self.waiting and (not engine.has_work() or rng.random() < 0.3):
                request = self.waiting.pop()
                engine.add(request)
                added.append(request.id)
            if rng.random() < 0.04:
                self.cancel(str(rng.choice(added)))
            if rng.random() < 0.04:
                engine.settle()
            collected = self.model.n_runs - len(engine._flights)
            steps = not engine._early and engine.has_work()
            outputs = engine.step()
            check_blocks(engine, self.model)
            # While there is work a step is one batch.
            assert self.model.n_runs - len(engine._flights) == collected + steps
            for output in outputs:
                assert not (self.outputs[output.request_id] and self.outputs[output.request_id][-1].last)
                self.outputs[output.request_id].append(output)
            patience -= 1
            assert patience >= 0, "a request starves"
        assert not engine._scheduler.waiting
        assert not engine._scheduler.running
        for request in self.requests.values():
            self.check(request, self.outputs[request.id])

    def check(self, request: Request, outputs: list[Output]) -> None:
        params = request.params
        assert [output.last for output in outputs] == [False] * (len(outputs) - 1) + [True]
        if request.id in self.cancelled:
            if params.n == params.n_branches and not params.embedding:
                for index in range(params.n):
                    found = [token for output in outputs if output.index == index for token in output.tokens]
                    assert found == alone(request, index, self.n_ctx)[0][: len(found)]
            return
        if params.embedding:
            total = np.sum([logits_of(digest) for _, digest in digests_of(request.prompt)], axis=0, dtype=float)
            np.testing.assert_allclose(outputs[0].embedding, total / np.linalg.norm(total), rtol=1e-5)
            return
        expected = [alone(request, index, self.n_ctx) for index in range(params.n_branches)]
        if params.n_branches > params.n:
            expected = sorted(expected, key=lambda item: -item[2])[: params.n]
        for index, (tokens, reason, _) in enumerate(expected):
            mine = [output for output in outputs if output.index == index]
            assert [token for output in mine for token in output.tokens] == tokens
            assert [output.finish_reason for output in mine] == [None] * (len(mine) - 1) + [reason]
            usage = mine[-1].usage
            assert usage is not None
            stopped = reason == "stop"
            assert (usage.n_prompt, usage.n_generated) == (len(request.prompt), len(tokens) + stopped)
            assert 0 <= usage.n_cached < len(request.prompt)
            if params.prompt_logprobs is not None:
                before = [logits_of(digest) for _, digest in digests_of(request.prompt[:-1])]
                scores = [logprob_of(row, token) for row, token in zip(before, request.prompt[1:], strict=True)]
                assert mine[0].prompt_logprobs is not None
                assert all(output.prompt_logprobs is None for output in mine[1:])
                found = [logprob.logprob for logprob in mine[0].prompt_logprobs if logprob]
                assert found == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize("part", range(PARTS))
def test_random_schedules(part, rng):
    first = int(rng.integers(1 << 40))
    totals = np.zeros(4, int)
    for seed in range(first, first + -(-N_SCHEDULES // PARTS)):
        schedule = Schedule(seed)
        try:
            schedule.run()
        except Exception as error:
            raise AssertionError(f"schedule {seed}: {error!r}") from error
        stats = schedule.engine.stats()
        totals += (stats.preemptions, stats.cached_tokens, stats.copied_blocks, len(schedule.cancelled))
    # Each of these must have come up often, or the schedules prove nothing.
    assert totals.min() >= N_SCHEDULES // PARTS // 20, totals
