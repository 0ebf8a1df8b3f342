"""From the hidden states of a prompt's tokens to one vector."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mpillama.errors import ModelError

_TYPES = {0: "mean", 1: "mean", 2: "cls", 3: "last"}
"""GGUF's numbers; 0 is a model that was not made for embeddings."""


def pooling_type(metadata: Mapping[str, Any]) -> str:
    """Return how a model's embeddings are pooled: ``mean``, ``cls`` or ``last``; ``mean`` if the file does not say.

    Raises:
        ModelError: the file asks for something else (4 is ranking, which needs a classifier).
    """
    number = metadata.get(f"{metadata.get('general.architecture')}.pooling_type", 1)
    if number not in _TYPES:
        raise ModelError(f"pooling_type {number} is not supported; mean (1), cls (2) and last (3) are")
    return _TYPES[number]


class Pooling:
    """Takes the hidden states of a prompt chunk by chunk.

    Args:
        kind: ``mean`` of all tokens, the first (``cls``) or the ``last``.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._sum: np.ndarray | None = None

    def add(self, hidden: np.ndarray) -> None:
        """Take the next tokens, float32 (T, n_embd)."""
        if self._kind == "mean":
            total = hidden.sum(axis=0, dtype=np.float64)
            self._sum = total if self._sum is None else self._sum + total
        elif self._kind == "last" or self._sum is None:
            self._sum = hidden[-1 if self._kind == "last" else 0].astype(np.float64)

    def result(self) -> np.ndarray:
        """Return the vector, of length 1: float32 (n_embd,). The divisor of the mean is lost in that."""
        if self._sum is None:
            raise ValueError("no hidden states")
        return (self._sum / max(float(np.linalg.norm(self._sum)), 1e-30)).astype(np.float32)
