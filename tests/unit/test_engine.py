"""What the engine makes of logits: text, ends, logprobs, constraints, order of service; the models follow a script."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpillama.backends.base import Batch
from mpillama.engine.engine import Engine
from mpillama.engine.request import Output, Request, RequestParams
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UsageError, UserError
from mpillama.tokenizer import load_tokenizer

GREEDY = SamplingParams(temp=0.0)
BOS, EOS, FIRST_BYTE = 1, 2, 3
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<think>", "</think>", "x"]
THINK, UNTHINK = 259, 260
CONTROL = 3


def tokenizer_of(thinking: int = CONTROL) -> Any:
    """A vocabulary of bytes, and tags of thinking that are control tokens or user-defined ones."""
    return load_tokenizer(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": WORDS,
            "tokenizer.ggml.scores": np.zeros(len(WORDS), np.float32),
            "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [thinking] * 2 + [1], np.int32),
            "tokenizer.ggml.add_space_prefix": False,
        }
    )


def ids_of(text: str) -> list[int]:
    return [FIRST_BYTE + byte for byte in text.encode()]


class Script:
    """A model that wants to write ``ids``, whatever comes before, and then a token for ever; notes what it ran."""

    def __init__(self, ids: list[int], n_prompt: int = 1, n_vocab: int = len(WORDS), then: int = EOS) -> None:
        self.ids, self.n_prompt, self.n_vocab, self.then = ids, n_prompt, n_vocab, then
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch) -> np.ndarray:
        self.batches.append(batch)
        logits = np.zeros((len(batch.logit_rows), self.n_vocab), np.float32)
        for row, position in zip(logits, batch.positions[batch.logit_rows].tolist(), strict=True):
            at = position + 1 - self.n_prompt
            row[self.ids[at] if at < len(self.ids) else self.then] = 10.0
        return logits


def engine_of(model: Any, n_ctx: int = 512, n_blocks: int = 64, **options: Any) -> Engine:
    tokenizer = options.pop("tokenizer", None) or tokenizer_of()
    return Engine(model, tokenizer, len(WORDS), n_ctx, n_blocks, **{"n_parallel": 4, **options})


def run(engine: Engine) -> list[Output]:
    outputs = []
    while engine.has_work():
        outputs += engine.step()
    return outputs


def write(ids: list[int], n_ctx: int = 512, tokenizer: Any = None, **params: Any) -> tuple[str, list[int], Output]:
    """Let a model that wants to write ``ids`` write; returns text, tokens and the last output."""
    engine = engine_of(Script(ids), n_ctx, tokenizer=tokenizer)
    engine.add(Request("a", (BOS,), RequestParams(sampling=GREEDY, **params)))
    outputs = run(engine)
    tokens = [token for output in outputs for token in output.tokens]
    return "".join(output.text for output in outputs), tokens, outputs[-1]


def test_text_ends_with_the_model() -> None:
    text, tokens, last = write(ids_of("wörld → x"))
    assert (text, tokens) == ("wörld → x", ids_of("wörld → x"))
    assert (last.finish_reason, last.stop_reason, last.last) == ("stop", None, True)
    assert last.usage is not None
    assert (last.usage.n_prompt, last.usage.n_generated) == (1, len(tokens) + 1)


def test_half_a_character_is_held_back_until_the_end() -> None:
    text, _, last = write(ids_of("aö")[:-1])
    assert text == "a�"
    assert last.text == "�"


@pytest.mark.parametrize("seed", range(20))
def test_stop_strings_across_tokens(seed, rng) -> None:
    text = "".join(rng.choice(list("aab"), 60))
    stops = tuple("".join(rng.choice(list("ab"), int(rng.integers(1, 7)))) for _ in range(2))
    found, _, last = write(ids_of(text), stop=stops)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (found, last.stop_reason) == (text, None)
        return
    seen = text[: min(ends)]
    cut = min(seen.find(stop) for stop in stops if stop in seen)
    assert found == seen[:cut]
    assert last.finish_reason == "stop"
    assert last.stop_reason in stops
    assert seen[cut:].startswith(str(last.stop_reason))


def test_limits_and_stop_tokens() -> None:
    ids = ids_of("abcdef")
    assert write(ids, max_tokens=3)[::2][0] == "abc"
    assert write(ids, max_tokens=3)[2].finish_reason == "length"
    text, tokens, last = write(ids, max_tokens=0)
    assert (text, tokens, last.finish_reason, last.last) == ("", [], "length", True)
    text, tokens, last = write(ids, stop_tokens=frozenset(ids_of("d")))
    assert (text, tokens, last.finish_reason, last.stop_reason) == ("abc", ids[:3], "stop", ids[3])
    # The KV cache holds n_ctx tokens; one more can be chosen from their logits.
    text, tokens, last = write(ids_of("a" * 99), n_ctx=40)
    assert (len(tokens), last.finish_reason, last.stop_reason) == (40, "length", "context")
    text, tokens, last = write([*ids, EOS, *ids], ignore_eos=True, max_tokens=9)
    assert EOS not in tokens
    assert last.finish_reason == "length"


def test_control_tokens_show_only_if_asked_for() -> None:
    ids = [THINK, *ids_of("a"), UNTHINK]
    assert write(ids)[0] == "a"
    assert write(ids, special=True)[0] == "<think>a</think>"


def test_logprobs_are_those_of_the_raw_logits(rng) -> None:
    n_vocab = len(WORDS)
    table = (rng.standard_normal((40, n_vocab)) * 5).astype(np.float32)

    def model(batch: Batch) -> np.ndarray:
        return table[batch.positions[batch.logit_rows]]

    sampling = SamplingParams(seed=5, temp=3.0, logit_bias=((7, 4.0),))
    engine = Engine(model, None, n_vocab, 512, 16)
    engine.add(Request("a", (9, 9, 9), RequestParams(sampling=sampling, max_tokens=20, logprobs=n_vocab)))
    outputs = run(engine)
    exact = table.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    for at, output in enumerate(outputs, 2):
        (logprob,) = output.logprobs
        assert [logprob.token] == output.tokens
        assert logprob.logprob == pytest.approx(exact[at, logprob.token], abs=1e-5)
        assert sum(np.exp(value) for _, value in logprob.top) == pytest.approx(1.0, abs=1e-5)
        assert [token for token, _ in logprob.top] == np.argsort(-exact[at], kind="stable").tolist()
    engine.add(Request("b", (9,), RequestParams(sampling=sampling, max_tokens=3, logprobs=0)))
    assert all(output.logprobs[0].top == () for output in run(engine))


@pytest.mark.parametrize("n_batch", [4, 64])
def test_logprobs_of_the_prompt(n_batch, rng, monkeypatch) -> None:
    n_vocab = len(WORDS)
    monkeypatch.setattr("mpillama.engine.engine._LOGITS_BYTES", 4 * n_vocab * 9)
    table = (rng.standard_normal((40, n_vocab)) * 5).astype(np.float32)
    most = [0]

    def model(batch: Batch) -> np.ndarray:
        most[0] = max(most[0], len(batch.logit_rows))
        return table[batch.positions[batch.logit_rows]]

    prompt = tuple(rng.integers(0, n_vocab, 37).tolist())
    engine = Engine(model, None, n_vocab, 512, 16, n_batch, 4)
    params = {"sampling": GREEDY, "max_tokens": 2}
    engine.add(Request("first", prompt, RequestParams(**params)))
    run(engine)
    for n in (1, 2):
        engine.add(Request(f"r{n}", prompt, RequestParams(**params, n=n, prompt_logprobs=n)))
    outputs = run(engine)
    assert most[0] <= 9 + 4
    exact = table.astype(np.float64)
    exact -= np.log(np.exp(exact).sum(axis=1, keepdims=True))
    found = [output for output in outputs if output.prompt_logprobs is not None]
    assert [(output.request_id, output.index) for output in sorted(found, key=lambda o: (o.request_id, o.index))] == [
        ("r1", 0),
        ("r2", 0),
        ("r2", 1),
    ]
    for output in found:
        first, *others = output.prompt_logprobs or []
        assert first is None
        assert [logprob.token for logprob in others if logprob] == list(prompt[1:])
        for at, logprob in enumerate(others):
            assert logprob is not None
            assert logprob.logprob == pytest.approx(exact[at, prompt[at + 1]], abs=1e-5)
            best = np.argsort(-exact[at])[: int(output.request_id[1])]
            assert [token for token, _ in logprob.top] == best.tolist()


def test_continuations_differ_and_repeat() -> None:
    def model(batch: Batch) -> np.ndarray:
        return np.zeros((len(batch.logit_rows), len(WORDS)), np.float32)

    def tokens_of(n: int, seed: int) -> list[list[int]]:
        engine = engine_of(model)
        sampling = SamplingParams(seed=seed, temp=1.0, samplers=())
        engine.add(Request("a", (BOS,), RequestParams(sampling=sampling, max_tokens=8, n=n, stop_tokens=frozenset())))
        outputs = run(engine)
        return [[t for output in outputs if output.index == i for t in output.tokens] for i in range(n)]

    first = tokens_of(4, 3)
    assert len({tuple(tokens) for tokens in first}) == 4
    assert tokens_of(4, 3) == first
    assert tokens_of(1, 5) == [first[2]]


def test_cancel_frees_blocks_at_once(rng) -> None:
    engine = engine_of(Script(ids_of("a" * 200), n_prompt=70), n_batch=32)
    prompt = tuple(rng.integers(3, 200, 70).tolist())
    engine.add(Request("a", prompt, RequestParams(sampling=GREEDY, n=3)))
    engine.step()
    assert engine.stats().kv_used == 3
    engine.cancel("a")
    assert engine.stats().kv_used == 0
    assert not engine.has_work()

    engine.add(Request("b", prompt, RequestParams(sampling=GREEDY, n=3, cache_prompt=False)))
    while engine.stats().generated_tokens < 9:
        engine.step()
    # Two full blocks shared, and a last one for each.
    assert engine.stats().kv_used == 2 + 3
    outputs = engine.cancel("b")
    assert [(o.index, o.finish_reason, o.last) for o in outputs] == [(i, "cancelled", i == 2) for i in range(3)]
    assert engine.stats().kv_used == 0
    assert engine.cancel("b") == []
    assert engine.step() == []


class Spell:
    """Lets through only the tokens of one text, as bits or as truth values; with ``end`` nothing may follow it."""

    def __init__(self, ids: list[int], end: bool, bits: bool, at: int = 0) -> None:
        self.ids, self.end, self.bits, self.at = ids, end, bits, at

    @property
    def finished(self) -> bool:
        return self.end and self.at == len(self.ids)

    def mask(self) -> np.ndarray:
        allowed = np.zeros(len(WORDS), np.bool_)
        allowed[self.ids[self.at] if self.at < len(self.ids) else EOS] = True
        if not self.bits:
            return allowed
        padded = np.pad(allowed, (0, -len(allowed) % 32))
        return np.packbits(padded, bitorder="little").view(np.int32)

    def accept(self, token: int) -> None:
        assert token == self.ids[self.at]
        self.at += 1

    def fork(self) -> Spell:
        return Spell(self.ids, self.end, self.bits, self.at)


@pytest.mark.parametrize("end", [False, True])
@pytest.mark.parametrize("bits", [False, True])
def test_constraint(end, bits) -> None:
    spell = Spell(ids_of("yes"), end, bits)
    text, _, last = write(ids_of("no, never"), constraint=spell, n=2, logprobs=0)
    assert text == "yyeess"  # two of them, a step at a time
    assert (last.finish_reason, last.stop_reason) == ("stop", None)
    assert spell.at == 0


def test_an_error_of_one_request_ends_only_that() -> None:
    class Nothing(Spell):
        def mask(self) -> np.ndarray:
            return np.zeros(len(WORDS), np.bool_)

        def fork(self) -> Nothing:
            return self

    engine = Engine(Script(ids_of("fine"), n_vocab=len(WORDS) + 1), tokenizer_of(), len(WORDS) + 1, 512, 64, 512, 4)
    engine.add(Request("a", (BOS,), RequestParams(sampling=GREEDY, constraint=Nothing([], False, False))))
    engine.add(Request("b", (BOS,), RequestParams(sampling=GREEDY)))
    # A vocabulary may be padded: there are logits for ids that have no text.
    bias = SamplingParams(temp=0.0, logit_bias=((len(WORDS), 99.0),))
    engine.add(Request("c", (BOS,), RequestParams(sampling=bias)))
    outputs = run(engine)
    for id, word in (("a", "grammar"), ("c", f"no token {len(WORDS)}")):
        (failed,) = [output for output in outputs if output.request_id == id]
        assert failed.finish_reason == "error"
        assert word in str(failed.stop_reason)
    assert "".join(output.text for output in outputs) == "fine"


@pytest.mark.parametrize("thinking", [CONTROL, 1])
@pytest.mark.parametrize("opened_by_prompt", [False, True])
@pytest.mark.parametrize("budget", [0, 3, 100])
def test_reasoning_budget(thinking, opened_by_prompt, budget) -> None:
    """Tags that are tokens of their own, or as good as plain text."""
    tokenizer = tokenizer_of(thinking)
    tag = ids_of("<think>") if thinking == 1 else [THINK]
    close = ids_of("</think>") if thinking == 1 else [UNTHINK]
    if thinking == 1:
        tokenizer.encode = lambda text, add_special=True: ids_of(text)
    prompt = (BOS, *tag) if opened_by_prompt else (BOS,)
    wish = [*([] if opened_by_prompt else tag), *ids_of("a" * 8), *close, *ids_of("b" * 9)]
    engine = engine_of(Script(wish, len(prompt)), tokenizer=tokenizer)
    engine.add(Request("a", prompt, RequestParams(sampling=GREEDY, reasoning_budget=budget, special=True)))
    text = "".join(output.text for output in run(engine))
    thought = text.removeprefix("<think>").partition("</think>")[0]
    assert thought == "a" * min(8, budget)
    assert text.startswith("<think>") != opened_by_prompt


def test_priority_goes_first_but_waiting_counts() -> None:
    now = [0.0]
    engine = engine_of(Script([], n_prompt=1), n_parallel=1, priority_seconds=10.0, clock=lambda: now[0])
    for id, arrival, priority in (("old", 0.0, 0), ("urgent", 25.0, 3), ("soon", 9.0, 1), ("late", 30.0, 1)):
        engine.add(Request(id, (BOS,), RequestParams(sampling=GREEDY, priority=priority), arrival))
    assert [output.request_id for output in run(engine)] == ["urgent", "soon", "old", "late"]


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    model = Script(ids_of("a" * 400))
    engine = engine_of(model, n_batch=20)
    engine.add(Request("short", (BOS,), RequestParams(sampling=GREEDY, max_tokens=30)))
    engine.step()
    engine.add(Request("long", (BOS,) * 150, RequestParams(sampling=GREEDY, max_tokens=1)))
    done = []
    while engine.has_work():
        done += [output.request_id for output in engine.step()]
    assert done[:7] == ["short"] * 7
    assert "long" in done[7:10]
    assert [batch.seq_lens.tolist() for batch in model.batches[1:4]] == [[1, 19]] * 3
    assert all(len(batch.logit_rows) == 1 for batch in model.batches[1:4])


def test_prompts_that_begin_alike_are_computed_once(rng) -> None:
    model = Script(ids_of("a" * 400))
    engine = engine_of(model, n_batch=40, n_parallel=16)
    stem = rng.integers(3, 200, 100).tolist()
    for i in range(16):
        engine.add(Request(str(i), (*stem, *ids_of("ab"), i + 3), RequestParams(sampling=GREEDY, max_tokens=2)))
    run(engine)
    # Three full blocks once; the rest is in blocks that are not full.
    assert engine.stats().prompt_tokens == 96 + 16 * 7
    assert engine.stats().cached_tokens == 15 * 96


def test_timings_add_up() -> None:
    now = [100.0]

    def model(batch: Batch) -> np.ndarray:
        now[0] += 2.0
        return Script(ids_of("abc"), n_prompt=30)(batch)

    engine = engine_of(model, n_batch=10, clock=lambda: now[0])
    engine.add(Request("a", (BOS,) * 30, RequestParams(sampling=GREEDY), arrival=95.0))
    last = run(engine)[-1]
    assert last.timings is not None
    assert (last.timings.queued, last.timings.prompt, last.timings.decode) == (5.0, 6.0, 6.0)
    assert last.timings.ttft == 11.0
    stats = engine.stats()
    assert (stats.steps, stats.run_seconds, stats.prompt_tokens, stats.generated_tokens) == (6, 12.0, 30, 4)


@pytest.mark.parametrize(
    ("prompt", "params", "word"),
    [
        ((), {}, "empty"),
        ((BOS,) * 32, {}, "raise -c"),
        ((BOS, 400), {}, "token 400"),
        ((BOS,), {"n": 5}, "raise -np"),
        ((BOS,), {"sampling": SamplingParams(logit_bias=((900, 1.0),))}, "token 900"),
    ],
)
def test_what_can_never_run_is_refused(prompt, params, word) -> None:
    engine = engine_of(Script([]), n_ctx=100, n_blocks=1)
    with pytest.raises(UserError, match=word):
        engine.add(Request("a", prompt, RequestParams(**params)))
    assert not engine.has_work()
    engine.add(Request("a", (BOS,), RequestParams()))
    with pytest.raises(UserError, match="already"):
        engine.add(Request("a", (BOS,), RequestParams()))


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": -1},
        {"prompt_logprobs": -1},
        {"n": 0},
        {"n": 3, "best_of": 2},
        {"logprobs": -1},
        {"priority": 101},
    ],
)
def test_wrong_parameters(params) -> None:
    with pytest.raises(UsageError, match=next(reversed(params))):
        RequestParams(**params)
