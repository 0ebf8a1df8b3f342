"""Mirostat: keeps the surprise of the text near a target, by feedback.

Basu et al., "Mirostat: A Neural Text Decoding Algorithm that Directly Controls Perplexity", 2020 (arXiv:2007.14966).
Surprise is in bits.
"""

from __future__ import annotations

import math

import numpy as np

from mpillama.engine.sampling.candidates import Candidates

# From how many of the most probable tokens version 1 estimates the exponent of Zipf's law (llama.cpp's m).
N_ESTIMATE = 100


class Mirostat:
    """Mirostat 1 (a top-k from an estimate of Zipf's exponent) or 2 (a bound on the surprise); it also draws."""

    def __init__(self, version: int, tau: float, eta: float, n_vocab: int) -> None:
        """tau: the target surprise; eta: the learning rate."""
        self.version = version
        self.tau = tau
        self.eta = eta
        self.n_vocab = n_vocab
        self.reset()

    def reset(self) -> None:
        """Forgets what was learned: the bound starts at twice the target."""
        self.mu = 2.0 * self.tau

    def sample(self, c: Candidates, u: float) -> int:
        """Chooses a token by a uniform number u in [0, 1) and learns from its surprise."""
        c = c.top(self._top_k(c)) if self.version == 1 else self._truncate(c)
        position = c.draw(u)
        surprise = -math.log2(c.softmax()[position])
        self.mu -= self.eta * (surprise - self.tau)
        return c.token(position)

    def _truncate(self, c: Candidates) -> Candidates:
        """Version 2: the tokens no more surprising than mu, and at least the most probable one."""
        with np.errstate(divide="ignore"):
            mask = -np.log2(c.softmax()) <= self.mu
        return c.keep(mask) if mask.any() else c.top(1)

    def _top_k(self, c: Candidates) -> int:
        """Version 1: how many tokens Zipf's law says have a mean surprise of mu."""
        top = c.top(N_ESTIMATE).logits.astype(np.float64)
        top = top[top > -np.inf]
        if len(top) < 2:
            return 1
        t = np.log1p(1 / np.arange(1, len(top)))
        s_hat = float(np.sum(t * -np.diff(top)) / np.sum(t * t))
        epsilon = s_hat - 1
        log_n = math.log(self.n_vocab)
        # epsilon / (1 - n_vocab ** -epsilon), which tends to 1 / log(n_vocab) where epsilon does to 0.
        ratio = epsilon / -math.expm1(-epsilon * log_n) if abs(epsilon) > 1e-12 else 1 / log_n
        log_k = self.mu * math.log(2) + math.log(ratio)
        if s_hat > 0:
            log_k = log_k / s_hat
        elif log_k > 0:
            log_k = math.inf
        return len(c) if log_k >= math.log(len(c)) else max(1, int(math.exp(log_k)))
