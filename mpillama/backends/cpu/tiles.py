"""Tiles of the KV cache as numbers; their layout is told in `kernels/attention_cache.h`."""

from __future__ import annotations

import numpy as np

from mpillama.backends.base import KV_BLOCK

_WIDTH = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16}


def read_keys(tiles: np.ndarray, type: str) -> np.ndarray:
    """Return keys, float32 (blocks, KV_BLOCK, heads, n_dim), of tiles uint8 (blocks, heads, bytes)."""
    n_blocks, n_heads, _ = tiles.shape
    if type in _WIDTH:
        # (blocks, heads, n_dim, tokens)
        numbers = _floats(tiles, type).reshape(n_blocks, n_heads, -1, KV_BLOCK)
    else:
        codes, factors = _parts(tiles, type)
        # A byte of q4_0 has elements i and i + 16 of 32: halves of a group, one after the other.
        groups = codes.reshape(n_blocks, n_heads, factors.shape[2], -1, KV_BLOCK)
        if type == "q4_0":
            groups = np.concatenate(_nibbles(groups), axis=3)
        else:
            groups = groups.view(np.int8).astype(np.float32)
        numbers = (groups * factors[:, :, :, None]).reshape(n_blocks, n_heads, -1, KV_BLOCK)
    return np.ascontiguousarray(numbers.transpose(0, 3, 1, 2))


def read_values(tiles: np.ndarray, type: str) -> np.ndarray:
    """Return values, likewise."""
    n_blocks, n_heads, _ = tiles.shape
    if type in _WIDTH:
        numbers = _floats(tiles, type).reshape(n_blocks, n_heads, KV_BLOCK, -1)
    else:
        codes, factors = _parts(tiles, type)
        groups = codes.reshape(n_blocks, n_heads, KV_BLOCK, factors.shape[2], -1)
        if type == "q4_0":
            groups = np.concatenate(_nibbles(groups), axis=4)
        else:
            groups = groups.view(np.int8).astype(np.float32)
        numbers = (groups * factors.transpose(0, 1, 3, 2)[..., None]).reshape(n_blocks, n_heads, KV_BLOCK, -1)
    return np.ascontiguousarray(numbers.transpose(0, 2, 1, 3))


def _floats(tiles: np.ndarray, type: str) -> np.ndarray:
    stored = np.ascontiguousarray(tiles).view(_WIDTH[type])
    if type == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def _parts(tiles: np.ndarray, type: str) -> tuple[np.ndarray, np.ndarray]:
    """Return codes, uint8 (blocks, heads, bytes), and factors, float32 (blocks, heads, groups of 32, tokens)."""
    n_blocks, n_heads, n_bytes = tiles.shape
    n_groups = n_bytes // KV_BLOCK // {"q8_0": 34, "q4_0": 18}[type]
    at = n_bytes - 2 * n_groups * KV_BLOCK
    factors = np.ascontiguousarray(tiles[..., at:]).view(np.float16).astype(np.float32)
    return np.ascontiguousarray(tiles[..., :at]), factors.reshape(n_blocks, n_heads, n_groups, KV_BLOCK)


def _nibbles(codes: np.ndarray) -> list[np.ndarray]:
    return [(codes & 15).astype(np.float32) - 8, (codes >> 4).astype(np.float32) - 8]
