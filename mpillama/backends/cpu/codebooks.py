"""The codebooks of the IQ types in the form of the native kernels: `kernels/codec_codebook.h`."""

from __future__ import annotations

from functools import cache

import numpy as np

from mpillama.backends import quant_grids as grids
from mpillama.gguf.types import GGMLType

_GRIDS = {
    GGMLType.IQ1_S: grids.IQ1,
    GGMLType.IQ1_M: grids.IQ1,
    GGMLType.IQ2_XXS: grids.IQ2_XXS,
    GGMLType.IQ2_XS: grids.IQ2_XS,
    GGMLType.IQ2_S: grids.IQ2_S,
    GGMLType.IQ3_XXS: grids.IQ3_XXS,
    GGMLType.IQ3_S: grids.IQ3_S,
}


@cache
def codebook(type: GGMLType) -> np.ndarray:
    """Return a uint16 for each vector of the type's codebook, of the levels of its weights; empty if there is none.

    Weights 0, 2 … are in the low byte, 1, 3 … in the high one, the first in the lowest bits.
    """
    if type not in _GRIDS:
        return np.zeros(0, np.uint16)
    grid = _GRIDS[type]
    weights = grid.view(np.int8).reshape(len(grid), -1)
    levels = np.searchsorted(np.unique(weights), weights)
    k = np.arange(weights.shape[1])
    shifts = 8 * (k % 2) + k // 2 * (16 // weights.shape[1])
    return np.bitwise_or.reduce(levels << shifts, axis=1).astype(np.uint16)
