"""How likely the model found a token, before any sampler, bias or constraint."""

from __future__ import annotations

import math

import numpy as np

from mpillama.engine.request import Logprob, Request
from mpillama.engine.sampling.candidates import largest


def logprob_of(logits: np.ndarray, token: int, n_top: int = 0) -> Logprob:
    """Return the logprob of a token and of the ``n_top`` likeliest ones, from float32 (n_vocab,)."""
    # Float32 but for the sum: six digits are enough for a report, at a fifth of the time.
    peak = logits.max()
    norm = float(peak) + math.log(np.exp(logits - peak).sum(dtype=np.float64))
    top = largest(logits, min(n_top, len(logits))).tolist()
    return Logprob(token, float(logits[token]) - norm, tuple((other, float(logits[other]) - norm) for other in top))


def read_prompt(found: list[Logprob | None], request: Request, n_past: int, logits: np.ndarray) -> None:
    """Note the logprobs of the tokens that follow the ``n_past`` first ones and their successors, (T, n_vocab)."""
    prompt, n_top = request.prompt, request.params.prompt_logprobs or 0
    # A prompt that was sent back to wait begins again.
    del found[n_past + 1 :]
    if not n_past:
        found[:] = [None]
    for row, token in zip(logits, prompt[n_past + 1 :], strict=False):
        found.append(logprob_of(row, token, n_top))
