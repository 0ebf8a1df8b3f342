"""Adaptive-p: prefers tokens whose probability is near a target, and corrects for the ones chosen so far."""

from __future__ import annotations

import numpy as np

from mpillama.engine.sampling.candidates import Candidates

# llama.cpp's constants of the transform: the logit at the target, the distance that counts as far, and the slope there.
PEAK = 5.0
WIDTH = 0.3
SHARPNESS = 10.0


class AdaptiveP:
    """Replaces the final draw. A target below 0 makes it a plain draw."""

    def __init__(self, target: float, decay: float) -> None:
        """decay: how slowly the mean of the chosen probabilities forgets, 0 to 0.99."""
        self.target = target
        self.decay = min(max(decay, 0.0), 0.99)
        self.reset()

    def reset(self) -> None:
        """Starts as if every token so far had had the target probability."""
        self._weight = 1 / (1 - self.decay)
        self._weighted_sum = self.target * self._weight
        self._pending: tuple[int, float] | None = None

    def transform(self, c: Candidates) -> Candidates:
        """The same tokens with logits that fall off, at first quadratically and then linearly, from the target."""
        if self.target < 0:
            return c
        target = min(self.target, 1.0)
        aim = min(max(2 * target - self._weighted_sum / self._weight, 0.0), 1.0)
        distance = np.abs(c.softmax() - aim) / WIDTH
        logits = (PEAK - SHARPNESS * distance**2 / (1 + distance)).astype(np.float32)
        return c.with_logits(np.where(c.logits > -np.inf, logits, c.logits))

    def sample(self, c: Candidates, u: float) -> int:
        """Chooses a token by a uniform number u in [0, 1)."""
        position = self.transform(c).draw(u)
        token = c.token(position)
        self._pending = (token, float(c.softmax()[position]))
        return token

    def accept(self, token: int) -> None:
        """Learns the probability of the token, if it is the one that was sampled."""
        if self.target >= 0 and self._pending is not None and self._pending[0] == token:
            self._weighted_sum = self._pending[1] + self.decay * self._weighted_sum
            self._weight = 1 + self.decay * self._weight
        self._pending = None
