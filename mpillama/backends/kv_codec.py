"""Cached numbers as bytes, by the type of the cache: what is read back is what was in the cache."""

from __future__ import annotations

import numpy as np

from mpillama.backends.quants import dequantize
from mpillama.errors import UsageError
from mpillama.gguf import types
from mpillama.gguf.types import GGMLType

CACHE_TYPES = {
    "f32": GGMLType.F32,
    "f16": GGMLType.F16,
    "bf16": GGMLType.BF16,
    "q8_0": GGMLType.Q8_0,
    "q4_0": GGMLType.Q4_0,
}
"""Of cached keys and values, independently of each other; the quantized ones need heads of whole blocks."""


def check_cache_type(what: str, name: str, n_dim: int) -> None:
    """Make sure that heads of ``n_dim`` elements can be cached in a type.

    Raises:
        UsageError: names ``what`` cannot, and the types that can.
    """
    if name not in CACHE_TYPES:
        raise UsageError(f"{what} cannot be cached as {name}; choose one of {', '.join(CACHE_TYPES)}")
    if n_dim % CACHE_TYPES[name].block_size:
        others = ", ".join(other for other, type in CACHE_TYPES.items() if n_dim % type.block_size == 0)
        raise UsageError(f"{what} of {n_dim} elements cannot be cached as {name}; choose one of {others}")


def row_bytes(type: str, n_dim: int) -> int:
    """Return the bytes of one key or value."""
    return types.row_bytes(CACHE_TYPES[type], n_dim)


def encode(x: np.ndarray, type: str) -> np.ndarray:
    """Return numbers that a cache of this type has kept, float32 (..., n), as uint8 (..., row bytes); without loss.

    Quantized types use GGUF's blocks. A block that has been rounded to a factor and codes contains its largest code
    (127, or -8), so that the factor can be found again.
    """
    x = np.ascontiguousarray(x, np.float32)
    if type == "f32":
        return x.astype("<f4", copy=False).view(np.uint8)
    if type == "f16":
        return x.astype("<f2").view(np.uint8)
    if type == "bf16":
        return (x.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    if type == "q8_0":
        factor = np.abs(blocks).max(axis=-1, keepdims=True) / np.float32(127)
        codes = _codes(blocks, factor).astype(np.int8).view(np.uint8)
    else:
        largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=-1)[..., None], axis=-1)
        factor = largest / np.float32(-8)
        nibbles = (_codes(blocks, factor) + 8).astype(np.uint8)
        codes = (nibbles[..., :16] | nibbles[..., 16:] << 4).astype(np.uint8)
    return np.concatenate([factor.astype("<f2").view(np.uint8), codes], axis=-1).reshape(*x.shape[:-1], -1)


def _codes(blocks: np.ndarray, factor: np.ndarray) -> np.ndarray:
    return np.rint(np.divide(blocks, factor, out=np.zeros_like(blocks), where=factor != 0))


def decode(raw: np.ndarray, type: str) -> np.ndarray:
    """Return float32 (..., n) of uint8 (..., row bytes)."""
    return dequantize(np.ascontiguousarray(raw), CACHE_TYPES[type])
