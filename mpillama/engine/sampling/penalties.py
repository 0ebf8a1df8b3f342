"""Repeat, frequency and presence penalties over a window of recent tokens."""

from __future__ import annotations

from collections import deque

import numpy as np

from mpillama.engine.sampling.candidates import Candidates


class Penalties:
    """Counts the last `last_n` tokens and makes them less likely, as llama.cpp does.

    A logit is divided by `repeat` if positive and multiplied if not, then loses `frequency` times the count and
    `presence` once.
    """

    def __init__(self, last_n: int, repeat: float, frequency: float, presence: float) -> None:
        self.repeat = np.float32(repeat)
        self.frequency = np.float32(frequency)
        self.presence = np.float32(presence)
        self.active = last_n > 0 and (repeat != 1 or frequency != 0 or presence != 0)
        self._window: deque[int] = deque(maxlen=max(last_n, 0))
        self._counts: dict[int, int] = {}

    @property
    def lowers(self) -> int | None:
        """How many tokens it makes less likely now; None if it may make some likelier."""
        if self.repeat < 1 or self.frequency < 0 or self.presence < 0:
            return None
        return len(self._counts)

    def accept(self, token: int) -> None:
        """Adds a token to the window; the oldest leaves it when it is full."""
        if not self.active:
            return
        if len(self._window) == self._window.maxlen:
            oldest = self._window[0]
            self._counts[oldest] -= 1
            if self._counts[oldest] == 0:
                del self._counts[oldest]
        self._window.append(token)
        self._counts[token] = self._counts.get(token, 0) + 1

    def reset(self) -> None:
        """Empties the window."""
        self._window.clear()
        self._counts.clear()

    def apply(self, c: Candidates) -> Candidates:
        """Penalizes the tokens in the window."""
        if not self.active or not self._counts:
            return c
        n = len(self._counts)
        at, found = c.find(np.fromiter(self._counts.keys(), np.int64, n))
        counts = np.fromiter(self._counts.values(), np.float32, n)[found]
        logits = c.editable()
        old = logits[at]
        with np.errstate(over="ignore"):  # a huge penalty may exclude a token altogether
            scaled = np.where(old <= 0, old * self.repeat, old / self.repeat)
            logits[at] = scaled - (counts * self.frequency + self.presence)
        return c.with_logits(logits, owned=True)
