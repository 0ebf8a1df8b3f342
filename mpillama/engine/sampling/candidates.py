"""The tokens still in the draw, and their logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillama.errors import UserError


@dataclass(frozen=True)
class Candidates:
    """Tokens that may still be chosen. Filters return new candidates and never write into the arrays of old ones.

    logits: float32 (n,); -inf excludes a token although it is still counted
    ids: int64 (n,), all different, or None while every token of the vocabulary is there: then the position is the id
    descending: whether the logits are known to be sorted, largest first
    """

    logits: np.ndarray
    ids: np.ndarray | None = None
    descending: bool = False

    def __len__(self) -> int:
        return len(self.logits)

    def token(self, position: int) -> int:
        """The token id at a position."""
        return int(position if self.ids is None else self.ids[position])

    def take(self, positions: np.ndarray, descending: bool = False) -> Candidates:
        """The candidates at these positions, in this order."""
        ids = positions if self.ids is None else self.ids[positions]
        return Candidates(self.logits[positions], ids, descending)

    def keep(self, mask: np.ndarray) -> Candidates:
        """The candidates where a bool (n,) mask is set, in the same order."""
        return self.take(np.flatnonzero(mask), self.descending)

    def with_logits(self, logits: np.ndarray, descending: bool = False) -> Candidates:
        """The same tokens with other logits."""
        return Candidates(logits, self.ids, descending)

    def find(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where tokens are: (positions int64 (m,), found bool (n_tokens,)), with m the number of tokens found."""
        if self.ids is None:
            return tokens, np.ones(len(tokens), dtype=bool)
        order = np.argsort(self.ids)
        at = order[np.minimum(np.searchsorted(self.ids, tokens, sorter=order), len(self) - 1)]
        found = self.ids[at] == tokens
        return at[found], found

    def first_tie(self) -> np.ndarray:
        """The position of the largest logit as an array of one; among equals the lowest token id."""
        ties = np.flatnonzero(self.logits == self.logits.max())
        return ties[:1] if self.ids is None else ties[[np.argmin(self.ids[ties])]]

    def top(self, k: int) -> Candidates:
        """The k largest logits, largest first; equal ones in the order they had."""
        k = min(k, len(self))
        return self.take(np.arange(k) if self.descending else largest(self.logits, k), descending=True)

    def weights(self) -> np.ndarray:
        """exp(logit - largest logit), float64 (n,): probabilities that do not sum to one yet."""
        peak = self.logits.max()
        if peak == -np.inf:
            raise UserError(
                "no token is left to choose from: --logit-bias, --ignore-eos or a penalty excludes all; relax them"
            )
        shifted = self.logits.astype(np.float64)
        shifted -= float(peak)
        return np.exp(shifted, out=shifted)

    def softmax(self) -> np.ndarray:
        """The probabilities, float64 (n,)."""
        weights = self.weights()
        return weights / weights.sum()

    def draw(self, u: float) -> int:
        """The position chosen by a uniform number u in [0, 1); never one of probability zero."""
        weights = self.weights()
        cumulative = np.cumsum(weights)
        position = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
        return min(position, int(np.flatnonzero(weights)[-1]))


def largest(values: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest values, largest first and equal ones in order of position: int64 (k,).

    The answer is the same on any machine, which argpartition does not promise among equal values. A whole vocabulary is
    narrowed down first by the maxima of pieces of it: the k-th largest maximum is a value that at least k values reach.
    """
    n = len(values)
    width = n // (4 * k) if k else 0
    if width > 1:
        peaks = values[: n // width * width].reshape(-1, width).max(axis=1)
        positions = np.flatnonzero(values >= np.partition(peaks, len(peaks) - k)[len(peaks) - k])
    else:
        positions = np.arange(n)
    near = values[positions]
    if len(near) > k > 0:
        bar = np.partition(near, len(near) - k)[len(near) - k]
        above, ties = positions[near > bar], positions[near == bar]
        positions = np.concatenate((above, ties[: k - len(above)]))
        near = values[positions]
    return positions[np.argsort(-near, kind="stable")[:k]]
