"""DRY ("don't repeat yourself"): penalizes the token that would continue a sequence that has been seen before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from mpillama.engine.sampling.candidates import Candidates

# The natural logarithm of the largest float32: the penalty stops growing before it overflows.
LOG_FLOAT32_MAX = 88.7228391


class Dry:
    """The DRY sampler, with llama.cpp's formula: multiplier * base ** (length of the repeat - allowed length).

    A repeat does not reach back across a sequence breaker. Breakers are looked for in the text of the tokens, so that
    one that spans several tokens is found however it was tokenized (llama.cpp looks for one tokenization of it).
    """

    def __init__(
        self,
        multiplier: float,
        base: float,
        allowed_length: int,
        last_n: int,
        breakers: Sequence[str],
        token_bytes: Callable[[int], bytes] | None,
    ) -> None:
        """last_n: how many tokens to look back; token_bytes: the text of a token, needed only if there are breakers."""
        self.active = multiplier != 0 and last_n > 0
        if self.active and breakers and token_bytes is None:
            raise ValueError("DRY sequence breakers need token_bytes")
        self.multiplier = multiplier
        self.base = base
        self.allowed_length = allowed_length
        self.last_n = last_n
        self.max_exponent = int(LOG_FLOAT32_MAX / math.log(base)) if base > 1.000001 else None
        self.breakers = tuple(breaker.encode() for breaker in breakers)
        self.token_bytes = token_bytes
        # Twice the window, so that moving it back to the start costs nothing per token.
        self._buffer = np.empty(2 * last_n if self.active else 0, dtype=np.int64)
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens."""
        self._end = 0
        self._since_breaker = 0
        self._tail = b""

    def accept(self, token: int) -> None:
        """Adds a token to the history."""
        if not self.active:
            return
        if self._end == len(self._buffer):
            self._buffer[: self.last_n] = self._buffer[self.last_n :]
            self._end = self.last_n
        self._buffer[self._end] = token
        self._end += 1
        self._since_breaker += 1
        if self.breakers and self.token_bytes is not None:
            before = len(self._tail)
            text = self._tail + self.token_bytes(token)
            if any(text.find(b, max(0, before - len(b) + 1)) >= 0 for b in self.breakers):
                self._since_breaker = 0
            n_tail = max(map(len, self.breakers)) - 1
            self._tail = text[-n_tail:] if n_tail else b""

    def repeats(self) -> dict[int, int]:
        """For each token that would continue a repeat: the length of the longest one, up to where the penalty stops."""
        window = self._buffer[max(0, self._end - self.last_n) : self._end][::-1]  # the newest token first
        limit = min(len(window), self._since_breaker)
        if len(window) <= self.allowed_length or limit < self.allowed_length:
            return {}
        if self.max_exponent is not None:
            # Longer repeats are punished no harder, so there is no need to measure them.
            limit = min(limit, self.allowed_length + self.max_exponent)
        # lengths[i]: how many tokens up to and including window[i] agree with the newest ones.
        lengths = np.zeros(len(window), dtype=np.int64)
        alive = np.arange(1, len(window))
        for length in range(limit):
            alive = alive[: np.searchsorted(alive, len(window) - length)]
            alive = alive[window[alive + length] == window[length]]
            if len(alive) == 0:
                break
            lengths[alive] = length + 1
        ends = np.flatnonzero(lengths >= self.allowed_length)
        ends = ends[ends > 0]
        ends = ends[np.argsort(lengths[ends], kind="stable")]  # the longest repeat of a token is stored last
        return dict(zip(window[ends - 1].tolist(), lengths[ends].tolist(), strict=True))

    def apply(self, c: Candidates) -> Candidates:
        """Penalizes the tokens that would continue a repeat, except those that contain a breaker themselves."""
        repeats = {t: n for t, n in self.repeats().items() if not self._breaks(t)} if self.active else {}
        if not repeats:
            return c
        at, found = c.find(np.fromiter(repeats.keys(), np.int64, len(repeats)))
        exponents = np.fromiter(repeats.values(), np.float64, len(repeats))[found] - self.allowed_length
        # Half the largest float32, so that a penalty alone never excludes every token.
        penalty = np.minimum(self.multiplier * self.base**exponents, float(np.finfo(np.float32).max) / 2)
        logits = c.editable()
        logits[at] -= penalty.astype(np.float32)
        return c.with_logits(logits, owned=True)

    def _breaks(self, token: int) -> bool:
        """Whether the text of a token contains a breaker."""
        if not self.breakers or self.token_bytes is None:
            return False
        text = self.token_bytes(token)
        return any(b in text for b in self.breakers)
