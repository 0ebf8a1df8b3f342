"""The last steps over a few sorted candidates, in plain Python: NumPy's calls would cost more than the numbers."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from mpillama.engine.sampling.candidates import Candidates
from mpillama.engine.sampling.params import SamplingParams

STEPS = frozenset(("top_p", "min_p", "temperature"))
"""What is known here; `filters` has the same formulas for any number of candidates."""
MOST = 128
"""Candidates up to which this is faster."""


def draw(c: Candidates, steps: Sequence[str], params: SamplingParams, u: float) -> int:
    """Return the token chosen by a uniform number u in [0, 1) after these steps.

    ``c`` is sorted, and its largest logit finite; the temperature is plain, and above 0.
    """
    logits, keep = c.logits, params.min_keep
    values: list[float] = logits.tolist()
    for name in steps:
        if name == "top_p":
            weights = _weights(values)
            total = sum(weights)
            values = values[: max(bisect_left(list(accumulate(w / total for w in weights)), params.top_p) + 1, keep)]
        elif name == "min_p":
            bar = float(logits[0] + math.log(params.min_p))
            # Negated, as bisect wants them to rise.
            values = values[: max(bisect_right(values, -bar, key=float.__neg__), keep, 1)]
        else:
            logits = logits[: len(values)] / np.float32(params.temp)
            values = logits.tolist()
    weights = _weights(values)
    cumulative = list(accumulate(weights))
    position = min(bisect_right(cumulative, u * cumulative[-1]), len(values) - 1)
    while not weights[position]:
        position -= 1
    return c.token(position)


def _weights(values: list[float]) -> list[float]:
    """exp(logit - largest logit), of logits whose largest comes first."""
    peak, exp = values[0], math.exp
    return [exp(value - peak) for value in values]
