"""The samplers with a memory: penalties and DRY against slow references; Mirostat and adaptive-p against their aims."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from mpillama.engine.sampling.adaptive import AdaptiveP
from mpillama.engine.sampling.candidates import Candidates
from mpillama.engine.sampling.dry import Dry
from mpillama.engine.sampling.mirostat import Mirostat
from mpillama.engine.sampling.penalties import Penalties

# A vocabulary of one-letter tokens, then ":" and pairs of letters.
PIECES = [bytes([c]) for c in b"abcdefgh"] + [b":", b"ab", b"bc", b"c:", b"xabx", b""]


def slow_penalties(logits, window, repeat, frequency, presence):
    out = logits.astype(np.float64)
    for token, count in Counter(window).items():
        out[token] = out[token] * repeat if out[token] <= 0 else out[token] / repeat
        out[token] -= count * frequency + presence
    return out


def test_penalties_against_the_formula(rng):
    for _ in range(200):
        n_vocab, last_n = int(rng.integers(1, 60)), int(rng.integers(1, 80))
        settings = (float(rng.uniform(0.5, 2)), float(rng.normal()), float(rng.normal()))
        penalties = Penalties(last_n, *settings)
        history = rng.integers(0, n_vocab, int(rng.integers(0, 200))).tolist()
        for token in history:
            penalties.accept(token)
        logits = rng.normal(0, 3, n_vocab).astype(np.float32)
        expected = slow_penalties(logits, history[-last_n:], *settings)
        np.testing.assert_allclose(penalties.apply(Candidates(logits)).logits, expected, rtol=1e-4, atol=1e-4)
        # The same after a filter has left only some tokens, in another order.
        some = rng.permutation(n_vocab)[: int(rng.integers(1, n_vocab + 1))]
        part = penalties.apply(Candidates(logits).take(some))
        np.testing.assert_allclose(part.logits, expected[some], rtol=1e-4, atol=1e-4)
        assert not part.descending


def test_penalties_worked_out_by_hand():
    penalties = Penalties(3, repeat=2, frequency=0.5, presence=0.25)
    for token in (3, 0, 1, 0):  # 3 has left the window of three
        penalties.accept(token)
    logits = Candidates(np.float32([4, -1, 7, 7]))
    assert penalties.apply(logits).logits.tolist() == [4 / 2 - 1.25, -1 * 2 - 0.75, 7, 7]
    penalties.reset()
    assert penalties.apply(logits) is logits


@pytest.mark.parametrize("settings", [(0, 2, 1, 1), (64, 1, 0, 0)])
def test_penalties_switched_off(settings):
    penalties = Penalties(*settings)
    penalties.accept(0)
    c = Candidates(np.float32([1, 2]))
    assert penalties.apply(c) is c


def slow_repeats(history, allowed, last_n, breakers):
    """What continues a repeat, by comparing every pair of places; breakers are looked for in the joined text."""
    window = history[-last_n:]
    reach = len(window)
    for back in range(1, len(history) + 1):
        piece = PIECES[history[-back]]
        # A breaker ends in this token if it occurs in the text up to here and touches the token's own bytes.
        before = b"".join(PIECES[t] for t in history[:-back])
        if any((before + piece).find(b, max(0, len(before) - len(b) + 1)) >= 0 for b in breakers):
            reach = min(reach, back - 1)
            break
    if len(window) <= allowed or reach < allowed:
        return {}
    best: dict[int, int] = {}
    for at in range(len(window) - 1):  # a repeat that ends here would be continued by the token at + 1
        length = 0
        while length <= at and length < reach and window[at - length] == window[-1 - length]:
            length += 1
        if length >= allowed:
            best[window[at + 1]] = max(length, best.get(window[at + 1], 0))
    return best


@pytest.mark.parametrize("breakers", [(), (":",), (":", "bc"), ("abc", "h"), ("a:b",)])
def test_dry_against_the_slow_reference(breakers, rng):
    seen = 0
    for _ in range(120):
        multiplier, base = float(rng.uniform(0.1, 2)), float(rng.choice([1.0, 1.1, 1.75, 3]))
        allowed, last_n = int(rng.integers(0, 5)), int(rng.choice([1, 5, 30, 200]))
        dry = Dry(multiplier, base, allowed, last_n, breakers, PIECES.__getitem__)
        tokens = [(0, 1), (0, 1, 2), (0, 1, 2, 8), tuple(range(len(PIECES)))][int(rng.integers(4))]
        history = rng.choice(tokens, int(rng.integers(0, 90))).tolist()
        for token in history:
            dry.accept(token)
        logits = rng.normal(0, 2, len(PIECES)).astype(np.float32)
        expected = logits.astype(np.float64)
        for token, length in slow_repeats(history, allowed, last_n, [b.encode() for b in breakers]).items():
            if not any(b.encode() in PIECES[token] for b in breakers):
                expected[token] -= multiplier * base ** (length - allowed)
                seen += 1
        np.testing.assert_allclose(dry.apply(Candidates(logits)).logits, expected, rtol=1e-5, atol=1e-4)
        some = rng.permutation(len(PIECES))[:5]
        part = dry.apply(Candidates(logits).take(some))
        np.testing.assert_allclose(part.logits, expected[some], rtol=1e-5, atol=1e-4)
    assert seen > 20


def dry_logits(history, breakers=(), multiplier=2.0, base=1.5, allowed=2, last_n=64):
    dry = Dry(multiplier, base, allowed, last_n, breakers, PIECES.__getitem__)
    for token in history:
        dry.accept(token)
    return dry.apply(Candidates(np.zeros(len(PIECES), np.float32))).logits


def test_dry_worked_out_by_hand():
    a, b, c, d, colon, ab, bc, c_colon = 0, 1, 2, 3, 8, 9, 10, 11
    # "abcd ... abc" may go on with d: a repeat of 3, one longer than allowed.
    logits = dry_logits([a, b, c, d, b, a, b, c])
    assert logits[d] == pytest.approx(-2 * 1.5)
    assert np.count_nonzero(logits) == 1
    # The longest of several repeats counts: after "abc" came d, after "bc" alone a too.
    logits = dry_logits([b, c, a, a, b, c, d, d, a, b, c])
    assert (logits[a], logits[d]) == (pytest.approx(-2.0), pytest.approx(-3.0))
    # A breaker within the repeat ends it, also when it is spread over two tokens or is a part of one.
    assert not dry_logits([a, colon, b, d, a, colon, b], breakers=(":",)).any()
    assert dry_logits([a, colon, b, d, a, colon, b]).any()
    assert not dry_logits([a, bc, colon, d, a, bc, colon], breakers=("c:",)).any()
    assert not dry_logits([a, c_colon, b, d, a, c_colon, b], breakers=(":",)).any()
    # The breaker itself is not penalized although it would continue a repeat.
    assert not dry_logits([a, b, colon, d, a, b], breakers=(":",)).any()
    # What has left the window is forgotten.
    assert not dry_logits([a, b, d, c, ab, a, b], last_n=5).any()
    assert dry_logits([a, b, d, c, ab, a, b], last_n=7).any()


def test_dry_stays_finite_in_an_endless_repeat():
    logits = dry_logits([0, 1] * 3000, last_n=6000, base=1.75, multiplier=5.0)
    assert np.isfinite(logits).all()
    assert logits[0] < -1e30
    assert logits[2] == 0


def test_dry_needs_text_only_for_breakers():
    with pytest.raises(ValueError, match="token_bytes"):
        Dry(1, 1.75, 2, 64, (":",), None)
    Dry(1, 1.75, 2, 64, (), None)
    Dry(0, 1.75, 2, 64, (":",), None)


def test_dry_reset_forgets_breakers_too():
    dry = Dry(1, 1.75, 1, 8, ("ab",), PIECES.__getitem__)
    dry.accept(0)
    dry.reset()
    for token in (1, 3, 1):
        dry.accept(token)
    assert dry.repeats() == {3: 1}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("tau", [2.0, 4.0])
def test_mirostat_brings_the_mean_surprise_to_its_target(version, tau):
    rng = np.random.default_rng(20)
    n_vocab = 5000
    mirostat = Mirostat(version, tau, 0.1, n_vocab)
    zipf = -1.1 * np.log(np.arange(1, n_vocab + 1))
    surprises = []
    for _ in range(1500):
        logits = (zipf + rng.normal(0, 0.3, n_vocab)).astype(np.float32)
        before = mirostat.mu
        mirostat.sample(Candidates(logits), rng.random())
        # mu moves by the learning rate times the error, which says what the surprise was.
        surprises.append((before - mirostat.mu) / mirostat.eta + tau)
    assert np.mean(surprises[300:]) == pytest.approx(tau, abs=0.15)
    assert min(surprises) > -1e-9
    mirostat.reset()
    assert mirostat.mu == 2 * tau


def test_mirostat_2_truncates_at_mu_bits():
    c = Candidates(np.log(np.array([0.5, 0.25, 0.15, 0.1])).astype(np.float32))
    mirostat = Mirostat(2, 1.25, 0.1, 4)  # mu = 2.5 bits: 0.5 (1 bit) and 0.25 (2 bits) stay
    assert [mirostat.sample(c, 0.66), mirostat.sample(c, 0.68)] == [0, 1]
    mirostat.mu = -1.0
    assert mirostat.sample(c, 0.99) == 0
    # one token is left, its surprise is 0, so mu moves up by eta * tau
    assert mirostat.mu == pytest.approx(-1 + 0.1 * 1.25)


@pytest.mark.parametrize("version", [1, 2])
def test_mirostat_copes_with_degenerate_logits(version):
    for logits in ([0.0] * 6, [1.0, -math.inf, -math.inf], [3.0], [1e4, -1e4, 0.0]):
        mirostat = Mirostat(version, 3.0, 0.1, len(logits))
        token = mirostat.sample(Candidates(np.float32(logits)), 0.3)
        assert logits[token] > -math.inf
        assert math.isfinite(mirostat.mu)


def test_adaptive_p_raises_what_is_near_the_target():
    c = Candidates(np.log(np.array([0.6, 0.3, 0.1])).astype(np.float32))
    adaptive = AdaptiveP(0.3, 0.9)
    logits = adaptive.transform(c).logits
    assert logits[1] == pytest.approx(5.0, abs=1e-5)
    assert logits[0] == pytest.approx(5 - 10 * 1 / 2, abs=1e-5)  # a full width away
    # After a likely token was taken the aim moves down: 2 * 0.3 - (0.6 + 0.9 * 3) / (1 + 9) = 0.27
    assert adaptive.sample(c, 0.0) == 0
    adaptive.accept(0)
    distance = np.abs(np.array([0.6, 0.3, 0.1]) - 0.27) / 0.3
    np.testing.assert_allclose(adaptive.transform(c).logits, 5 - 10 * distance**2 / (1 + distance), rtol=1e-5)
    adaptive.accept(1)  # not what was sampled: changes nothing
    np.testing.assert_allclose(adaptive.transform(c).logits, 5 - 10 * distance**2 / (1 + distance), rtol=1e-5)
    adaptive.reset()
    np.testing.assert_array_equal(adaptive.transform(c).logits, logits)
    assert AdaptiveP(-1, 0.9).transform(c) is c
