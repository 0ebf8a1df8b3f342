"""Every filter against a slow and plain reference, on fresh random logits, and small cases worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpillama.engine.sampling import filters
from mpillama.engine.sampling.candidates import Candidates, largest


def candidates(probs: list[float]) -> Candidates:
    with np.errstate(divide="ignore"):
        return Candidates(np.log(np.array(probs, dtype=np.float64)).astype(np.float32))


def kept(c: Candidates) -> dict[int, float]:
    return {c.token(i): float(c.logits[i]) for i in range(len(c))}


def softmax(logits: dict[int, float]) -> dict[int, float]:
    peak = max(logits.values())
    weights = {t: math.exp(x - peak) for t, x in logits.items()}
    total = math.fsum(weights.values())
    return {t: w / total for t, w in weights.items()}


def by_size(logits: dict[int, float]) -> list[int]:
    return sorted(logits, key=lambda t: -logits[t])  # equal ones stay in their order


def slow_top_p(logits, p, min_keep):
    probs, chosen = softmax(logits), []
    for token in by_size(logits):
        chosen.append(token)
        if math.fsum(probs[t] for t in chosen) >= p and len(chosen) >= min_keep:
            break
    return set(chosen)


def slow_min_p(logits, p, min_keep):
    order = by_size(logits)
    bar = logits[order[0]] + math.log(p)
    return {t for rank, t in enumerate(order) if logits[t] >= bar or rank < min_keep}


def slow_typical(logits, p, min_keep):
    probs, chosen = softmax(logits), []
    entropy = -math.fsum(q * math.log(q) for q in probs.values() if q > 0)
    for token in sorted(logits, key=lambda t: abs(-math.log(probs[t]) - entropy) if probs[t] else math.inf):
        chosen.append(token)
        if math.fsum(probs[t] for t in chosen) > p and len(chosen) >= min_keep:
            break
    return set(chosen)


def slow_top_n_sigma(logits, n):
    values = [x for x in logits.values() if x > -math.inf]
    mean = math.fsum(values) / len(values)
    sigma = math.sqrt(math.fsum((x - mean) ** 2 for x in values) / len(values))
    return {t for t, x in logits.items() if x >= max(values) - n * sigma and x > -math.inf}


def slow_xtc(logits, threshold, min_keep):
    probs, order = softmax(logits), by_size(logits)
    above = [t for t in order if probs[t] >= threshold]
    dropped = set(above[:-1])
    return set(order) - dropped if len(order) - len(dropped) >= min_keep else set(order)


def random_case(rng) -> tuple[Candidates, dict[int, float]]:
    """Random logits, some of them excluded, either of the whole vocabulary or of a few tokens in any order."""
    n = int(rng.choice([1, 2, 5, 40, 700]))
    logits = rng.normal(0, rng.choice([0.3, 2, 6]), n).astype(np.float32)
    logits[1:][rng.random(n - 1) < rng.choice([0, 0.2])] = -np.inf
    ids = None if rng.random() < 0.5 else rng.permutation(4 * n)[:n]
    c = Candidates(logits, ids)
    if rng.random() < 0.3:
        c = c.top(n)
    return c, kept(c)


def test_filters_keep_what_the_slow_reference_keeps(rng):
    for _ in range(400):
        c, logits = random_case(rng)
        p = float(rng.uniform(0.01, 0.99))
        min_keep = int(rng.integers(0, min(len(c), 9) + 1))
        assert set(kept(filters.top_p(c, p, min_keep))) == slow_top_p(logits, p, min_keep)
        assert set(kept(filters.min_p(c, p**4, min_keep))) == slow_min_p(logits, p**4, min_keep)
        if len(c) > 1:
            got = filters.top_n_sigma(c, 3 * p)
            assert {t for t, x in kept(got).items() if x > -math.inf} == slow_top_n_sigma(logits, 3 * p)
            assert len(got) == len(c)
            assert set(kept(filters.xtc(c, 1, p / 3, min_keep, 0.5))) == slow_xtc(logits, p / 3, min_keep)
        if np.isfinite(c.logits).all():
            assert set(kept(filters.typical(c, p, min_keep))) == slow_typical(logits, p, min_keep)
        k = int(rng.integers(1, len(c) + 3))
        top = filters.top_k(c, k)
        assert len(top) == min(k, len(c))
        assert sorted(top.logits.tolist(), reverse=True) == top.logits.tolist()
        assert top.logits.tolist() == sorted(logits.values(), reverse=True)[:k]


def test_filters_do_not_depend_on_the_order_of_the_vocabulary(rng):
    n = 500
    logits = rng.normal(0, 3, n).astype(np.float32)
    shuffle = rng.permutation(n)
    for run in (
        lambda c: filters.top_k(c, 37),
        lambda c: filters.top_p(c, 0.8, 0),
        lambda c: filters.min_p(c, 0.02, 0),
        lambda c: filters.typical(c, 0.7, 0),
        lambda c: filters.top_n_sigma(c, 1.3),
        lambda c: filters.xtc(c, 1, 0.05, 0, 0),
        lambda c: filters.dynamic_temperature(c, 0.9, 0.4, 1.2),
    ):
        a, b = kept(run(Candidates(logits))), kept(run(Candidates(logits[shuffle], shuffle)))
        assert a.keys() == b.keys()
        assert all(math.isclose(a[t], b[t], rel_tol=1e-5, abs_tol=1e-5) or a[t] == b[t] for t in a)


def test_filters_leave_their_input_alone(rng):
    c, _ = random_case(rng)
    before = c.logits.copy()
    filters.top_n_sigma(c, 0.5)
    filters.temperature(c, 0.5)
    c.softmax()
    np.testing.assert_array_equal(c.logits, before)


@pytest.mark.parametrize("n", [1, 9, 300, 20000, 131072])
def test_largest_is_a_stable_sort_cut_short(n, rng):
    for values in (
        rng.normal(0, 3, n).astype(np.float32),
        rng.integers(0, 5, n).astype(np.float32),  # nearly all are ties
        np.sort(rng.normal(0, 3, n)).astype(np.float32),
        np.where(rng.random(n) < 5 / n, rng.normal(size=n), -np.inf).astype(np.float32),
        np.zeros(n, np.float32),
    ):
        order = np.argsort(-values, kind="stable")
        for k in {0, 1, 40, n // 2, n}:
            np.testing.assert_array_equal(largest(values, min(k, n)), order[: min(k, n)])


def test_top_p_looks_further_than_its_first_guess():
    c = Candidates(np.zeros(50_000, np.float32))
    assert len(filters.top_p(c, 0.5001, 0)) == pytest.approx(25_005, abs=1)
    assert len(filters.top_p(c, 0.00001, 3000)) == 3000
    np.testing.assert_array_equal(filters.top_p(c, 0.25, 0).ids[:5], np.arange(5))


@pytest.mark.parametrize(
    ("run", "tokens"),
    [
        (lambda c: filters.top_p(c, 0.0, 0), {2}),
        (lambda c: filters.top_p(c, 0.49, 0), {2}),
        (lambda c: filters.top_p(c, 0.51, 0), {2, 1}),
        (lambda c: filters.top_p(c, 0.0, 3), {2, 1, 3}),
        (lambda c: filters.top_p(c, 0.96, 0), {0, 1, 2, 3}),
        (lambda c: filters.min_p(c, 0.11, 0), {1, 2, 3}),
        (lambda c: filters.min_p(c, 0.09, 0), {0, 1, 2, 3}),
        (lambda c: filters.min_p(c, 1.0, 0), {2}),
        (lambda c: filters.min_p(c, 1.0, 2), {1, 2}),
        (lambda c: filters.xtc(c, 0.5, 0.1, 0, 0.49), {0, 3}),
        (lambda c: filters.xtc(c, 0.5, 0.1, 0, 0.51), {0, 1, 2, 3}),
        (lambda c: filters.xtc(c, 1.0, 0.25, 0, 0.0), {0, 1, 3}),
        (lambda c: filters.xtc(c, 1.0, 0.25, 4, 0.0), {0, 1, 2, 3}),
        (lambda c: filters.xtc(c, 1.0, 0.4, 0, 0.0), {0, 1, 2, 3}),
        # entropy 1.142 nats; surprises 2.996, 1.204, 0.693, 1.897
        (lambda c: filters.typical(c, 0.29, 0), {1}),
        (lambda c: filters.typical(c, 0.31, 0), {1, 2}),
        (lambda c: filters.typical(c, 0.81, 0), {1, 2, 3}),
        (lambda c: filters.temperature(c, 0), {2}),
        (lambda c: filters.temperature(c, -1), {2}),
    ],
)
def test_cases_worked_out_by_hand(run, tokens):
    assert set(kept(run(candidates([0.05, 0.30, 0.50, 0.15])))) == tokens


@pytest.mark.parametrize(
    "run",
    [
        lambda c: filters.top_k(c, 0),
        lambda c: filters.top_k(c, -1),
        lambda c: filters.top_p(c, 1, 0),
        lambda c: filters.min_p(c, 0, 0),
        lambda c: filters.typical(c, 1, 0),
        lambda c: filters.top_n_sigma(c, 0),
        lambda c: filters.top_n_sigma(c, -1),
        lambda c: filters.xtc(c, 0, 0.1, 0, 0),
        lambda c: filters.xtc(c, 1, 0.51, 0, 0),
        lambda c: filters.dynamic_temperature(c, 1, 0, 1),
    ],
)
def test_disabled_means_untouched(run):
    c = candidates([0.7, 0.2, 0.1])
    assert run(c) is c


def test_top_p_is_reached_but_typical_is_passed():
    quarters = Candidates(np.zeros(4, np.float32))
    assert set(kept(filters.top_p(quarters, 0.5, 0))) == {0, 1}
    assert set(kept(filters.typical(quarters, 0.5, 0))) == {0, 1, 2}


def test_a_draw_never_takes_what_is_excluded():
    c = Candidates(np.float32([-np.inf, 0, 0, -np.inf]))
    assert [c.draw(u) for u in (0.0, 0.49, 0.5, 1 - 2**-53)] == [1, 1, 2, 2]


def test_typical_puts_excluded_tokens_last():
    assert set(kept(filters.typical(candidates([0.5, 0, 0.5, 0]), 0.9, 0))) == {0, 2}
    assert set(kept(filters.typical(candidates([0.5, 0, 0.5, 0]), 0.9, 3))) == {0, 1, 2}


def test_temperature_sharpens_by_its_power():
    probs = filters.temperature(candidates([0.2, 0.3, 0.5]), 0.5).softmax()
    np.testing.assert_allclose(probs, np.array([0.04, 0.09, 0.25]) / 0.38, rtol=1e-6)


def test_greedy_takes_the_lowest_id_of_equals():
    assert kept(filters.temperature(Candidates(np.float32([1, 5, 5, 2])), 0)) == {1: 5}
    assert kept(filters.temperature(Candidates(np.float32([1, 5, 5]), np.array([9, 8, 4])), 0)) == {4: 5}


def test_dynamic_temperature_at_its_two_ends():
    """An even distribution gets the highest temperature, a certain one the lowest."""
    even = filters.dynamic_temperature(Candidates(np.float32([3, 3, 3])), 1, 0.5, 1)
    np.testing.assert_allclose(even.logits, 2, rtol=1e-6)
    sure = filters.dynamic_temperature(Candidates(np.float32([90, 0, -5])), 1, 0.5, 1)
    np.testing.assert_allclose(sure.logits, [180, 0, -10], rtol=1e-5)


def test_dynamic_temperature_in_between(rng):
    logits = rng.normal(0, 2, 30).astype(np.float32)
    probs = softmax(dict(enumerate(logits.astype(float))))
    evenness = -math.fsum(q * math.log(q) for q in probs.values()) / math.log(30)
    expected = logits / (0.3 + 1.0 * evenness**0.7)
    np.testing.assert_allclose(
        filters.dynamic_temperature(Candidates(logits), 0.8, 0.5, 0.7).logits, expected, rtol=1e-5
    )


@pytest.mark.parametrize("temp", [1e-45, 1e-31, 1e-29, 1e-10])
def test_a_tiny_temperature_is_greedy_and_overflows_nowhere(temp):
    probs = filters.temperature(Candidates(np.float32([700, 699, -700])), temp).softmax()
    assert probs[0] == 1
