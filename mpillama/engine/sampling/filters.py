"""The samplers without memory: pure functions from candidates to candidates.

Each is a no-op at the setting llama.cpp calls disabled, and keeps at least `min_keep` candidates where llama.cpp does.
"""

from __future__ import annotations

import math

import numpy as np

from mpillama.engine.sampling.candidates import Candidates, largest

# Below this a float32 logit divided by the temperature may overflow, and the draw has long been an argmax.
GREEDY_TEMPERATURE = 1e-30


def top_k(c: Candidates, k: int) -> Candidates:
    """The k most probable tokens, sorted; k <= 0 keeps all."""
    return c.top(k) if k > 0 else c


def top_p(c: Candidates, p: float, min_keep: int) -> Candidates:
    """Nucleus sampling: the fewest most probable tokens that reach probability p together, sorted; p >= 1 keeps all."""
    if p >= 1:
        return c
    probs = c.softmax()
    if c.descending:
        return c.first(max(_count(probs, p, reach=True), min_keep))
    return c.take(_until(c.logits, probs, p, min_keep, reach=True), descending=True)


def min_p(c: Candidates, p: float, min_keep: int) -> Candidates:
    """The tokens at least p times as probable as the most probable one; p <= 0 keeps all."""
    if p <= 0:
        return c
    mask = c.logits >= np.float32(c.peak) + math.log(p)
    n = int(np.count_nonzero(mask))
    if n < max(min_keep, 1):
        return c.top(max(min_keep, 1))
    return c.first(n) if c.descending else c.keep(mask)


def typical(c: Candidates, p: float, min_keep: int) -> Candidates:
    """Locally typical sampling: tokens whose surprise is nearest to the entropy, until p is passed; p >= 1 keeps all.

    Meister et al., "Locally Typical Sampling", 2022 (arXiv:2202.00666). Tokens of probability zero come last.
    """
    if p >= 1:
        return c
    probs = c.softmax()
    with np.errstate(divide="ignore"):
        surprise = -np.log(probs)
    return c.take(_until(-np.abs(surprise - _entropy(probs)), probs, p, min_keep, reach=False))


def top_n_sigma(c: Candidates, n: float) -> Candidates:
    """Excludes logits more than n standard deviations below the largest; n <= 0 excludes none. The count stays.

    Tang et al., "Top-nσ: Not All Logits Are You Need", 2024 (arXiv:2411.07641).
    """
    if n <= 0 or len(c) <= 1:
        return c
    finite = c.logits[c.logits > -np.inf]
    if len(finite) == 0:
        return c
    bar = float(finite.max()) - n * float(finite.std(dtype=np.float64))
    return c.with_logits(np.where(c.logits < bar, np.float32(-np.inf), c.logits), c.descending)


def xtc(c: Candidates, probability: float, threshold: float, min_keep: int, u: float) -> Candidates:
    """Exclude top choices: with this probability, drops all but the least probable of the tokens at or above threshold.

    u: a uniform number in [0, 1). A threshold above 0.5 disables it: no two tokens can reach that.
    """
    if probability <= 0 or threshold > 0.5 or len(c) < 2 or u >= probability:
        return c
    n_above = int(np.count_nonzero(c.softmax() >= threshold))
    if n_above < 2 or len(c) - (n_above - 1) < min_keep:
        return c
    mask = np.ones(len(c), dtype=bool)
    mask[largest(c.logits, n_above - 1)] = False
    return c.keep(mask)


def temperature(c: Candidates, temp: float) -> Candidates:
    """Logits divided by the temperature; at temp <= 0 only the largest is left, the lowest id among equals."""
    if temp < GREEDY_TEMPERATURE:
        return c.take(c.first_tie(), descending=True)
    return c if temp == 1 else c.with_logits(c.logits / np.float32(temp), c.descending, owned=True)


def dynamic_temperature(c: Candidates, temp: float, spread: float, exponent: float) -> Candidates:
    """A temperature between temp - spread and temp + spread, the higher the more even the distribution is.

    The entropy as a share of the largest possible one, raised to the exponent, says how high; spread <= 0: temp.
    """
    if spread <= 0:
        return temperature(c, temp)
    if len(c) <= 1:
        return c
    low = max(0.0, temp - spread)
    evenness = min(1.0, max(0.0, _entropy(c.softmax()) / math.log(len(c))))
    return temperature(c, low + (temp + spread - low) * evenness**exponent)


def _entropy(probs: np.ndarray) -> float:
    """Entropy in nats; a probability of zero adds nothing."""
    positive = probs[probs > 0]
    return float(-np.sum(positive * np.log(positive)))


def _until(scores: np.ndarray, probs: np.ndarray, p: float, min_keep: int, reach: bool) -> np.ndarray:
    """Positions of the best scores, best first, until their probabilities reach (or, if not `reach`, pass) p.

    Sorts only as many as turn out to be needed: usually a few hundred of a whole vocabulary.
    """
    n = len(scores)
    m = min(n, max(256, min_keep))
    while True:
        positions = largest(scores, m)
        count = _count(probs[positions], p, reach)
        if count <= m or m == n:
            return positions[: max(count, min_keep)]
        m = min(n, m * 16)


def _count(probs: np.ndarray, p: float, reach: bool) -> int:
    """How many of these probabilities, from the first, reach (or, if not `reach`, pass) p; if all do not, one more."""
    return int(np.searchsorted(np.cumsum(probs), p, side="left" if reach else "right")) + 1
