"""How likely the model found a token, before any sampler, bias or constraint."""

from __future__ import annotations

import math

import numpy as np

from mpillama.engine.request import Logprob
from mpillama.engine.sampling.candidates import largest


def logprob_of(logits: np.ndarray, token: int, n_top: int = 0) -> Logprob:
    """Return the logprob of a token and of the ``n_top`` likeliest ones, from float32 (n_vocab,)."""
    # Float32 but for the sum: six digits are enough for a report, at a fifth of the time.
    peak = logits.max()
    norm = float(peak) + math.log(np.exp(logits - peak).sum(dtype=np.float64))
    top = largest(logits, min(n_top, len(logits))).tolist()
    return Logprob(token, float(logits[token]) - norm, tuple((other, float(logits[other]) - norm) for other in top))
