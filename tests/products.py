"""Weights and errors of the tests of products."""

import numpy as np

from mpillama.backends.base import RawWeight
from mpillama.backends.quants import dequantize
from tiny import random_blocks


def error(y, reference, size=None):
    """Return the relative error of a result, in the Euclidean norm."""
    size = np.linalg.norm(reference) if size is None else size
    return np.linalg.norm(y - reference) / size if size else np.abs(y).max(initial=0.0)


def product_error(y, x, matrix):
    """Return the error of y (T, rows) as the product of x (T, n) and a matrix (rows, n), float64 both.

    Relative to what random signs make of the sums: of a single number it may happen that little is left.
    """
    return error(y, x @ matrix.T, np.linalg.norm(np.sqrt(np.square(x) @ np.square(matrix.T))))


def make_weight(rng, backend, type, n_mats, n_rows, n_in, pad=(0, 0)):
    """Return a random weight and its float64 matrices (n_mats, n_rows, n_in)."""
    raw = random_blocks(rng, type, (n_mats, n_rows, n_in))
    return backend.weight(RawWeight("w", type, raw, n_in, pad)), dequantize(raw, type).astype(np.float64)
