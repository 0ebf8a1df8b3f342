"""The tokens still in the draw, and their logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mpillama.errors import UserError

# A whole vocabulary is looked at as rows of so many logits: column j holds the positions j, j + _COLUMNS, …
_COLUMNS = 4096


@dataclass(frozen=True)
class Candidates:
    """Tokens that may still be chosen. Filters return new candidates and never write into the arrays of old ones.

    logits: float32 (n,); -inf excludes a token although it is still counted
    ids: int64 (n,), all different but for -1, or None while every token of the vocabulary is there: then the position
        is the id
    descending: whether the logits are known to be sorted, largest first
    peaks: of the logits' columns, where they are known: see `column_peaks`
    owned: whether the logits are a copy that nobody else has, so that `editable` need not make another
    """

    logits: np.ndarray
    ids: np.ndarray | None = None
    descending: bool = False
    peaks: np.ndarray | None = None
    owned: bool = False

    @classmethod
    def of_top(cls, row: np.ndarray) -> Candidates:
        """The largest logits of a vocabulary, from a row of `Backend.top_k`; tokens of -inf are counted, as -1."""
        k = len(row) // 2
        return cls(row[:k], row[k:].astype(np.int64), descending=True)

    def __len__(self) -> int:
        return len(self.logits)

    def by_id(self) -> Candidates:
        """The same in the order of the vocabulary."""
        return self if self.ids is None else self.take(np.argsort(self.ids))

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

    def first(self, n: int) -> Candidates:
        """The first n candidates."""
        if n >= len(self):
            return self
        ids = np.arange(n) if self.ids is None else self.ids[:n]
        return Candidates(self.logits[:n], ids, self.descending)

    def with_logits(self, logits: np.ndarray, descending: bool = False, owned: bool = False) -> Candidates:
        """The same tokens with other logits."""
        return Candidates(logits, self.ids, descending, owned=owned)

    def editable(self) -> np.ndarray:
        """The logits to write into, for candidates that take the place of these."""
        return self.logits if self.owned else self.logits.copy()

    @property
    def peak(self) -> float:
        """The largest logit; NaN if there is one anywhere."""
        if self.descending:
            return float(self.logits[0])
        return float((self.logits if self.peaks is None else self.peaks).max())

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
        if self.descending:
            return self.first(k)
        return self.take(largest(self.logits, k, self.peaks), descending=True)

    def weights(self) -> np.ndarray:
        """exp(logit - largest logit), float64 (n,): probabilities that do not sum to one yet."""
        peak = self.peak
        if peak == -np.inf:
            raise UserError(
                "no token is left to choose from: --logit-bias, --ignore-eos or a penalty excludes all; relax them"
            )
        shifted = self.logits.astype(np.float64)
        shifted -= peak
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


def column_peaks(values: np.ndarray) -> np.ndarray | None:
    """The largest value of each column (NaN if there is one), or None where there are too few values to be worth it."""
    n_rows, n_rest = divmod(len(values), _COLUMNS)
    if n_rows < 4:
        return None
    # Rows of neighbours: NumPy compares whole rows at once.
    peaks = values[: n_rows * _COLUMNS].reshape(n_rows, _COLUMNS).max(axis=0)
    np.maximum(peaks[:n_rest], values[n_rows * _COLUMNS :], out=peaks[:n_rest])
    return peaks


def largest(values: np.ndarray, k: int, peaks: np.ndarray | None = None) -> np.ndarray:
    """Positions of the k largest values, largest first and equal ones in order of position: int64 (k,).

    The answer is the same on any machine, which argpartition does not promise among equal values. A whole vocabulary is
    narrowed down first by the largest value of each column: the k-th largest of these is one that k values reach, and
    only columns that reach it have to be looked at.
    """
    if peaks is None and k < _COLUMNS // 2:
        peaks = column_peaks(values)
    if peaks is not None and 0 < k < len(peaks):
        bar = np.partition(peaks, len(peaks) - k)[len(peaks) - k]
        columns = np.flatnonzero(peaks >= bar)
        if len(columns) < len(peaks) // 2:
            n_rows = -(-len(values) // _COLUMNS)
            positions = (np.arange(0, n_rows * _COLUMNS, _COLUMNS)[:, None] + columns).ravel()
            if positions[-1] >= len(values):
                positions = positions[: np.searchsorted(positions, len(values))]
            positions = positions[values[positions] >= bar]
        else:
            positions = np.flatnonzero(values >= bar)
    else:
        positions = np.arange(len(values))
    near = values[positions]
    if len(near) > k > 0:
        bar = np.partition(near, len(near) - k)[len(near) - k]
        above, ties = positions[near > bar], positions[near == bar]
        positions = np.concatenate((above, ties[: k - len(above)]))
        near = values[positions]
    return positions[np.argsort(-near, kind="stable")[:k]]
