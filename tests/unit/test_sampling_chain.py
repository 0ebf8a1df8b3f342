"""The sampler as a whole: order, seeds, distribution, biases and errors."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpillama.backends.reference import ReferenceBackend
from mpillama.engine.sampling.candidates import Candidates
from mpillama.engine.sampling.chain import Sampler
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UsageError, UserError

# The value a chi-square with 9 degrees of freedom exceeds once in a million.
CHI_SQUARE_9 = 45.1


def sampler(n_vocab=10, n_ctx=512, **params) -> Sampler:
    return Sampler(SamplingParams(**params), n_vocab, n_ctx, lambda token: b"<%d>" % token)


def stream(s: Sampler, rows) -> list[int]:
    tokens = []
    for row in rows:
        tokens.append(s.sample(row))
        s.accept(tokens[-1])
    return tokens


def test_the_same_seed_gives_the_same_tokens_also_after_a_reset(rng):
    seed = int(rng.integers(2**32 - 1))
    rows = rng.normal(0, 2, (60, 1000)).astype(np.float32)
    settings = {"repeat_penalty": 1.2, "dry_multiplier": 0.8, "xtc_probability": 0.5, "xtc_threshold": 0.05}
    for params in (
        {},
        settings,
        {"mirostat": 1},
        {"mirostat": 2},
        {"samplers": ("adaptive_p",), "adaptive_target": 0.2},
    ):
        s = sampler(1000, seed=seed, **params)
        first = stream(s, rows)
        assert stream(sampler(1000, seed=seed, **params), rows) == first
        assert stream(sampler(1000, seed=seed ^ 1, **params), rows) != first
        s.reset()
        assert stream(s, rows) == first


def test_a_seed_gives_these_numbers_on_every_machine():
    """Even logits make the token the tens digit of the draw; the numbers are PCG64's, which NumPy promises to keep."""
    s = sampler(10, seed=42, samplers=())
    expected = [int(10 * u) for u in np.random.Generator(np.random.PCG64(42)).random(40)[1::2]]
    assert [s.sample(np.zeros(10, np.float32)) for _ in range(20)] == expected
    assert expected[:6] == [4, 6, 9, 7, 4, 9]


def test_the_stream_does_not_depend_on_the_number_of_candidates():
    flat = np.zeros(10, np.float32)
    one = np.full(10, -np.inf, np.float32)
    one[3] = 0
    for params in ({}, {"xtc_probability": 1.0}, {"mirostat": 2}):
        plenty, single = sampler(seed=7, **params), sampler(seed=7, **params)
        plenty.sample(flat)
        single.sample(one)
        if single._mirostat is not None:
            single._mirostat.mu = plenty._mirostat.mu
        assert [plenty.sample(flat) for _ in range(20)] == [single.sample(flat) for _ in range(20)]


def test_a_random_seed_can_be_read_and_used_again(rng):
    rows = rng.normal(0, 1, (30, 50)).astype(np.float32)
    for seed in (-1, 2**32 - 1):
        a, b = sampler(50, seed=seed), sampler(50, seed=seed)
        assert a.seed != b.seed
        assert 0 <= a.seed < 2**32 - 1
        assert stream(sampler(50, seed=a.seed), rows) == stream(a, rows)
    assert sampler(seed=12).seed == 12


@pytest.mark.parametrize(
    ("params", "probs"),
    [
        ({"samplers": ()}, lambda p: p),
        ({"samplers": ("temperature",), "temp": 0.5}, lambda p: p**2),
        (
            {"samplers": ("top_k", "temperature"), "temp": 1.0, "top_k": 5},
            lambda p: np.where(p >= np.sort(p)[-5], p, 0),
        ),
        ({"samplers": ("adaptive_p",)}, lambda p: p),
        ({"temp": 1.0, "min_p": 0.0, "top_p": 1.0}, lambda p: p),
        ({"samplers": (), "logit_bias": ((2, math.log(4)),)}, lambda p: np.where(np.arange(10) == 2, 4 * p, p)),
    ],
)
def test_tokens_follow_the_distribution(params, probs):
    p = probs(np.array([0.02, 0.2, 0.03, 0.15, 0.1, 0.05, 0.05, 0.25, 0.08, 0.07]))
    p = p / p.sum()
    logits = np.log(np.array([0.02, 0.2, 0.03, 0.15, 0.1, 0.05, 0.05, 0.25, 0.08, 0.07])).astype(np.float32)
    s = sampler(seed=1234, **params)
    n = 20000
    counts = np.bincount([s.sample(logits) for _ in range(n)], minlength=10)
    assert not counts[p == 0].any()
    chi_square = np.sum((counts - n * p)[p > 0] ** 2 / (n * p[p > 0]))
    assert chi_square < CHI_SQUARE_9


def test_xtc_strikes_as_often_as_it_should():
    s = sampler(3, seed=5, samplers=("xtc",), xtc_probability=0.3, xtc_threshold=0.2)
    logits = np.log(np.array([0.6, 0.39, 0.01])).astype(np.float32)
    n = 20000
    # Struck, token 0 is gone; else it comes with 0.6. The two draws must be independent.
    share = sum(s.sample(logits) == 0 for _ in range(n)) / n
    assert share == pytest.approx(0.7 * 0.6, abs=5 * math.sqrt(0.42 * 0.58 / n))


def test_temp_zero_is_an_exact_argmax(rng):
    for _ in range(50):
        logits = rng.normal(0, 3, 3000).astype(np.float32).round(1)  # rounded, so that there are ties
        for temp in (0.0, -1.0):
            assert sampler(3000, temp=temp).sample(logits) == int(np.argmax(logits))
            assert sampler(3000, temp=temp, mirostat=2).sample(logits) == int(np.argmax(logits))
            assert sampler(3000, temp=temp, samplers=("temperature",)).sample(logits) == int(np.argmax(logits))


def test_samplers_run_in_the_order_given():
    # 0.5, 0.3, 0.2: top-k 2 first leaves 0.625 and 0.375, of which top-p 0.6 keeps one; without it, two.
    logits = np.log(np.array([0.5, 0.3, 0.2])).astype(np.float32)

    def reached(samplers: tuple[str, ...]) -> set[int]:
        s = sampler(3, seed=3, top_k=2, top_p=0.6, samplers=samplers)
        return {s.sample(logits) for _ in range(200)}

    assert reached(("top_k", "top_p")) == {0}
    assert reached(("top_p", "top_k")) == {0, 1}


def test_history_reaches_penalties_and_dry():
    logits = np.float32([3, 2, 1, 0])
    s = sampler(4, temp=0, repeat_last_n=2, presence_penalty=10)
    s.accept(0, generated=False)
    assert s.sample(logits) == 1
    s.accept(1)
    assert s.sample(logits) == 2
    s.accept(2)
    assert s.sample(logits) == 0  # has left the window
    s = sampler(4, temp=0, dry_multiplier=10, dry_sequence_breakers=())
    for token in (1, 2, 0, 1, 2):
        s.accept(token, generated=False)
    assert s.sample(logits) == 1
    s.reset()
    assert s.sample(logits) == 0


@pytest.mark.parametrize("flag", ["repeat_last_n", "dry_penalty_last_n"])
def test_a_window_of_minus_one_is_the_context(flag):
    switch = {"presence_penalty": 10} if flag == "repeat_last_n" else {"dry_multiplier": 10, "dry_allowed_length": 1}
    logits = np.float32([3, 2, 1, 0])
    for n_ctx, token in ((6, 1), (3, 0)):
        s = sampler(4, n_ctx=n_ctx, temp=0, dry_sequence_breakers=(), **{flag: -1}, **switch)
        for seen in (3, 0, 2, 2, 3):
            s.accept(seen)
        assert s.sample(logits) == token


def test_logit_bias():
    logits = np.float32([3, 2, 1, 0])
    assert sampler(4, temp=0, logit_bias=((0, -1.5),)).sample(logits) == 1
    assert sampler(4, temp=0, logit_bias=((3, 2.0), (3, 2.0))).sample(logits) == 3
    assert sampler(4, temp=0, logit_bias=((0, -math.inf), (1, -math.inf))).sample(logits) == 2
    s = sampler(4, seed=1, temp=5, logit_bias=((1, math.inf), (2, math.inf)))
    assert {s.sample(logits) for _ in range(100)} == {1, 2}
    s = sampler(4, temp=0, logit_bias=((1, math.inf), (1, -math.inf), (2, math.inf)))
    assert s.sample(logits) == 2
    assert sampler(4, mirostat=2, logit_bias=((3, math.inf),)).sample(logits) == 3
    assert logits.tolist() == [3, 2, 1, 0]


def test_a_ban_holds_for_every_draw(rng):
    logits = rng.normal(0, 0.1, 20).astype(np.float32)
    s = sampler(20, samplers=(), logit_bias=tuple((t, -math.inf) for t in range(0, 20, 2)))
    assert {s.sample(logits) for _ in range(1000)} == set(range(1, 20, 2))


def test_errors_are_one_clear_line():
    with pytest.raises(UsageError, match="token 10 is not in the vocabulary, whose ids are 0 to 9"):
        sampler(10, logit_bias=((10, 1.0),))
    with pytest.raises(UserError, match="no token is left"):
        sampler(2, logit_bias=((0, -math.inf), (1, -math.inf))).sample(np.zeros(2, np.float32))
    for value, text in ((math.nan, "NaN at 1 of 3 logits, first at token 1"), (math.inf, r"\+inf at 1 of 3")):
        with pytest.raises(UserError, match=text):
            sampler(3).sample(np.float32([0, value, 0]))
    with pytest.raises(UserError, match="every token a logit of -inf"):
        sampler(3).sample(np.full(3, -np.inf, np.float32))
    with pytest.raises(ValueError, match="float32"):
        sampler(3).sample(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match="float32"):
        sampler(3).sample(np.zeros(3, np.float64))


@pytest.mark.parametrize("n_vocab", [128256, 262144])
def test_any_setting_works_on_a_real_vocabulary(n_vocab, rng):
    logits = rng.normal(0, 3, n_vocab).astype(np.float32)
    for params in ({}, {"top_k": 0}, {"typical": 0.9}, {"mirostat": 1}, {"mirostat": 2}, {"top_n_sigma": 1.0}):
        token = sampler(n_vocab, seed=1, **params).sample(logits)
        assert logits[token] >= np.sort(logits)[-n_vocab // 2]


def plainly(logits, params, seen, u) -> int:
    """Penalties, top-k, top-p, min-p and temperature over the whole vocabulary, sorted."""
    x = logits.copy()
    for token, bias in params.logit_bias:
        x[token] += np.float32(bias)
    for token in set(seen):
        factor = np.float32(params.repeat_penalty)
        x[token] = x[token] * factor if x[token] <= 0 else x[token] / factor
        x[token] -= np.float32(seen.count(token)) * np.float32(params.frequency_penalty)
    ids = np.argsort(-x, kind="stable")[: params.top_k or len(x)]
    x = x[ids]

    def weights(x):
        return np.exp(x.astype(np.float64) - float(x[0]))

    n = int(np.searchsorted(np.cumsum(weights(x) / weights(x).sum()), params.top_p)) + 1
    x, ids = x[:n], ids[:n]
    x, ids = (each[: np.count_nonzero(x >= x[0] + math.log(params.min_p))] for each in (x, ids))
    cumulative = np.cumsum(weights(x / np.float32(params.temp)))
    return int(ids[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


@pytest.mark.parametrize("n_vocab", [50, 4096 * 4, 4096 * 5 + 1, 60_000])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"top_k": 1},
        {"top_k": 3000},
        {"top_k": 0},
        {"repeat_penalty": 1.3, "frequency_penalty": 0.2},
        {"repeat_penalty": 1.1, "logit_bias": ((7, -math.inf), (11, 2.5))},
    ],
)
def test_a_whole_vocabulary_gives_what_the_plain_formulas_do(n_vocab, given, rng):
    params = SamplingParams(seed=int(rng.integers(2**31)), **given)
    s = Sampler(params, n_vocab, 512, None)
    draws = np.random.Generator(np.random.PCG64(params.seed)).random(2 * 12)[1::2]
    seen = []
    for i, u in enumerate(draws):
        logits = rng.normal(0, 3, n_vocab).astype(np.float32)
        if i % 3 == 1:
            logits = np.round(logits)  # ties
        elif i % 3 == 2:
            logits[rng.permutation(n_vocab)[: n_vocab - 5]] = -np.inf
        before = logits.copy()
        token = s.sample(logits)
        assert token == plainly(logits, params, seen, u)
        np.testing.assert_array_equal(logits, before)
        s.accept(token)
        seen.append(token)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, 40),
        ({"temp": 0.0}, 1),
        ({"temp": 0.0, "top_k": 0}, 1),
        ({"top_k": 100, "min_p": 0.0, "typical": 0.8, "xtc_probability": 0.5}, 100),
        ({"repeat_penalty": 1.3, "frequency_penalty": 0.2, "presence_penalty": 0.1}, 104),
        ({"logit_bias": ((7, -math.inf), (11, -2.5)), "repeat_penalty": 1.1}, 106),
        ({"logit_bias": ((7, -math.inf), (11, -2.5)), "temp": 0.0}, 3),
        ({"dynatemp_range": 0.5, "adaptive_target": 0.3, "samplers": ("top_k", "temperature", "adaptive_p")}, 40),
        # What these need is more than the largest.
        ({"top_k": 0}, 0),
        ({"mirostat": 2}, 0),
        ({"top_n_sigma": 1.0}, 0),
        ({"dry_multiplier": 0.5}, 0),
        ({"logit_bias": ((7, 0.5),)}, 0),
        ({"repeat_penalty": 0.9}, 0),
        ({"samplers": ("top_p", "top_k")}, 0),
    ],
)
def test_the_largest_logits_are_enough(given, most, rng):
    n_vocab, seed = int(rng.integers(150, 3000)), int(rng.integers(2**31))
    whole, few = (sampler(n_vocab, seed=seed, **given) for _ in range(2))
    needed = []
    for i in range(60 if most else 1):
        logits = rng.normal(0, 3, n_vocab).astype(np.float32)
        if i % 3 == 1:
            logits = np.round(logits)  # ties
        elif i % 3 == 2:
            logits[rng.permutation(n_vocab)[: n_vocab - 12]] = -np.inf
        needed.append(few.n_top())
        token = whole.sample(logits)
        if needed[-1]:
            top = Candidates.of_top(ReferenceBackend().top_k(logits[None], needed[-1], 0)[0])
            assert few.sample(top) == token
        for s in (whole, few):
            s.accept(token)
    assert max(needed) <= most
    assert min(needed) >= min(most, 1)
    if most:
        with pytest.raises(UserError, match="a logit of -inf"):
            few.sample(Candidates.of_top(ReferenceBackend().top_k(np.full((1, n_vocab), -np.inf, np.float32), 9, 0)[0]))
        logits[5] = np.nan
        with pytest.raises(UserError, match="first at token 5;"):
            few.sample(Candidates.of_top(ReferenceBackend().top_k(logits[None], 9, 0)[0]))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_no_number_is_found_wherever_it_is(wrong, rng):
    for n_vocab in (10, 4096 * 4 + 7):
        for at in (0, int(rng.integers(n_vocab)), n_vocab - 1):
            logits = rng.normal(0, 3, n_vocab).astype(np.float32)
            logits[at] = wrong
            for temp in (0.0, 0.8):
                with pytest.raises(UserError, match=f"first at token {at};"):
                    sampler(n_vocab, temp=temp).sample(logits)
