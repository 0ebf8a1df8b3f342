"""Requests handed out to replicas, which here are threads with an engine over a fake model each."""

import time

import numpy as np
import pytest
from test_engine import Script, tokenizer_of
from test_engine_fuzz import N_VOCAB, FakeModel, alone

from mpillama.comm.threads import run_threads
from mpillama.engine.engine import Engine
from mpillama.engine.request import Request, RequestParams
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UserError
from mpillama.openai.constraints import AfterThought, Grammars
from mpillama.replicas import Engines, lead

GREEDY = SamplingParams(temp=0.0)
N_CTX, N_BLOCKS, SIZE, N_BATCH, N_PARALLEL = 128, 16, 32, 32, 4


class Leader:
    """Notes that the ranks of a replica have been stopped."""

    code = None

    def stop(self, code):
        self.code = code


def engine_of(model=None):
    model = model or FakeModel(N_BLOCKS, SIZE, N_BATCH, N_PARALLEL)
    return Engine(model, None, N_VOCAB, N_CTX, N_BLOCKS, N_BATCH, N_PARALLEL)


def run(n_replicas, body, models=None):
    """Run ``body`` on the engines of so many replicas; returns its result, and the other replicas' engines."""

    def main(world):
        engine = engine_of(models and models[world.rank])
        if world.rank:
            leader = Leader()
            code = lead(world, engine, leader, None)
            assert leader.code == code == 7
            return engine
        engines = Engines(world, engine, range(n_replicas))
        try:
            return body(engines)
        finally:
            engines.stop(7)

    result, *others = run_threads(n_replicas, main, timeout=30)
    return result, others


def request(id_, prompt, max_tokens=8, **params):
    return Request(id_, tuple(prompt), RequestParams(GREEDY, max_tokens, **params))


def finish(engines, tokens):
    """Step until there is no work; adds tokens by request and continuation, and returns who ended, in order."""
    ended = []
    while engines.has_work():
        for output in engines.step():
            tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
            if output.last:
                ended.append(output.request_id)
    return ended


@pytest.mark.parametrize("n_replicas", [1, 2, 3])
def test_every_request_is_answered_once_as_if_it_were_alone(n_replicas, rng):
    starts = [rng.integers(0, N_VOCAB, 70).tolist() for _ in range(3)]
    requests = []
    for i in range(60):
        prompt = starts[rng.integers(3)][: rng.integers(1, 70)] + rng.integers(0, N_VOCAB, 4).tolist()
        sampling = SamplingParams(temp=0.8, seed=i)
        params = RequestParams(sampling, int(rng.integers(0, 12)), n=int(rng.integers(1, 4)), priority=i % 3)
        requests.append(Request(f"r{i}", tuple(prompt), params))
    dropped = {f"r{i}" for i in rng.choice(60, 10, replace=False)}

    def body(engines):
        tokens, ended = {}, []
        for i, each in enumerate(requests):
            engines.add(each)
            if i % 5 == 4:
                for output in engines.step():
                    tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
                    ended += [output.request_id] if output.last else []
            if each.id in dropped:
                engines.cancel(each.id)
                engines.cancel(each.id)
        ended += finish(engines, tokens)
        stats = engines.stats()
        assert (stats.kv_used, stats.waiting, stats.running) == (0, 0, 0)
        assert stats.kv_blocks == n_replicas * N_BLOCKS
        assert all(replica.load == 0 for replica in engines._replicas.values())
        return tokens, ended

    (tokens, ended), others = run(n_replicas, body)
    assert sorted(ended) == sorted({each.id for each in requests} - dropped)
    for each in requests:
        for index in range(0 if each.id in dropped else each.params.n):
            assert tokens[each.id, index] == alone(each, index, N_CTX)[0], each.id
    # How many depends on which thread gets the processor.
    assert all(engine.stats().requests > 0 for engine in others)


@pytest.mark.parametrize("n_replicas", [2, 3])
def test_replicas_that_have_nothing_to_do_get_the_same(n_replicas, rng):
    def body(engines):
        for round_ in range(5):
            for i in range(n_replicas * N_PARALLEL):
                engines.add(request(f"r{round_}.{i}", rng.integers(0, N_VOCAB, rng.integers(1, 70))))
            finish(engines, {})
        return engines.stats()

    total, others = run(n_replicas, body)
    assert total.finished == 5 * n_replicas * N_PARALLEL
    assert [engine.stats().finished for engine in others] == [5 * N_PARALLEL] * (n_replicas - 1)


def test_a_slow_replica_gets_less_and_nobody_waits_for_it(rng):
    """It ends when the fast one does, and has not piled up what the fast one could have done."""

    class Slow(FakeModel):
        def __call__(self, batch):
            time.sleep(0.02)
            return super().__call__(batch)

    sizes = (N_BLOCKS, SIZE, N_BATCH, N_PARALLEL)
    others = run(
        2,
        lambda engines: [
            *(engines.add(request(f"r{i}", rng.integers(0, N_VOCAB, 5))) for i in range(80)),
            finish(engines, {}),
        ],
        [FakeModel(*sizes), Slow(*sizes)],
    )[1]
    assert 0 < others[0].stats().finished < 30


def test_a_prompt_goes_where_its_beginning_was_seen(rng):
    """Unless others have nothing to do while many wait there."""

    def body(engines):
        prompts = [rng.integers(0, N_VOCAB, 70).tolist() for _ in range(8)]
        for i, prompt in enumerate(prompts):
            engines.add(request(f"a{i}", prompt, 2))
        finish(engines, {})
        before = engines.stats().cached_tokens
        for i in rng.permutation(8).tolist():
            engines.add(request(f"b{i}", [*prompts[i], 3, 4], 2))
            finish(engines, {})
        assert engines.stats().cached_tokens - before == 8 * 64
        steps = engines._replicas[1].stats.steps
        for i in range(12):
            engines.add(request(f"c{i}", [*prompts[0], i], 2))
        finish(engines, {})
        assert engines._replicas[1].stats.steps > steps

    run(2, body)


def test_what_stops_in_the_middle_goes_on_later(rng):
    prompt = rng.integers(0, N_VOCAB, 9).tolist()

    def main(world):
        engine = engine_of()
        if world.rank:
            for _ in range(2):
                lead(world, engine, Leader(), None)
            return None
        engines, tokens = Engines(world, engine, range(2)), {}
        for i in range(4):
            engines.add(request(f"r{i}", prompt, 30))
        for _ in range(3):
            for output in engines.step():
                tokens.setdefault((output.request_id, output.index), []).extend(output.tokens)
        engines.stop()
        ended = finish(engines, tokens)
        engines.stop()
        assert sorted(ended) == ["r0", "r1", "r2", "r3"]
        return tokens

    tokens = run_threads(2, main, timeout=30)[0]
    assert all(own == alone(request("r", prompt, 30), 0, N_CTX)[0] for own in tokens.values())


def test_mistakes_are_told_at_once_and_failures_by_name(rng):
    def broken(batch):
        raise UserError("NCCL failed")

    def body(engines):
        with pytest.raises(UserError, match="shorten it"):
            engines.add(request("long", [1] * 200))
        with pytest.raises(UserError, match="not in the vocabulary"):
            engines.add(request("odd", [N_VOCAB]))
        engines.add(request("twice", [1]))
        with pytest.raises(UserError, match="twice already"):
            engines.add(request("twice", [1]))
        for i in range(4):
            engines.add(request(f"r{i}", rng.integers(0, N_VOCAB, 5)))
        with pytest.raises(UserError, match="the replica of rank 1 on threads: NCCL failed"):
            finish(engines, {})

    run(2, body, [FakeModel(N_BLOCKS, SIZE, N_BATCH, N_PARALLEL), broken])


def test_grammars_travel(rng):
    """Also those that hold only after a thought."""
    tokenizer = tokenizer_of()
    grammars = Grammars(tokenizer, tokenizer.n_vocab)
    bodies = [
        grammars.regex("ab+c"),
        grammars.json_schema({"enum": [12, 345]}),
        grammars.gbnf('root ::= "yes" | "no"'),
        AfterThought(grammars.lark('start: "x"'), tokenizer, "</think>"),
    ]

    def main(world):
        engine = Engine(Script([], then=260), tokenizer, tokenizer.n_vocab, 64, 8, 32, 2)
        if world.rank:
            lead(world, engine, Leader(), Grammars(tokenizer, tokenizer.n_vocab))
            return engine.stats().finished
        engines, texts = Engines(world, engine, range(2)), {}
        for i in range(16):
            params = RequestParams(GREEDY, 12, constraint=bodies[i % 4], special=True, cache_prompt=False)
            engines.add(Request(f"r{i}", (5,), params))
        while engines.has_work():
            for output in engines.step():
                texts[output.request_id] = texts.get(output.request_id, "") + output.text
        engines.stop()
        return texts

    texts, n = run_threads(2, main, timeout=60)
    assert n > 2
    for i in range(16):
        assert texts[f"r{i}"] == texts[f"r{i % 4}"]
    assert texts["r3"].startswith("</think>x")
    assert np.unique(list(texts.values())).size == 4
