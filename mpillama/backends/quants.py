"""Dequantization on NumPy: the plain statement of every block format, and the oracle of faster kernels.

Layouts are those of the block structs in ggml-common.h. Products are rounded in the order of ggml's own reference
(scale times block factor first, then times the quant), so that results are the same to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from mpillama.backends import quant_grids as grids
from mpillama.errors import ModelError
from mpillama.gguf.types import GGMLType

# Weights at a time: blocks, quants and results of a chunk stay in a core's cache together.
_CHUNK = 1 << 16

_IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
# E2M1 (OCP Microscaling Formats v1.0) times 2, as ggml has them, to be met with half of the scale.
_MXFP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)
# Scales of NVFP4: E4M3 without sign, times 1/2; 0x7F, which is not a number, counts as zero.
_UE4M3_HALVES = np.array([math.ldexp(i % 8 + 8 * (i > 7), max(i // 8, 1) - 11) for i in range(128)] * 2, np.float32)
_UE4M3_HALVES[0x7F] = 0
_SHIFTS_2 = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
_SHIFTS_1 = np.arange(8, dtype=np.uint8)[:, None]
_SHIFTS_3, _SHIFTS_4 = np.arange(0, 12, 3, dtype=np.uint16), np.arange(0, 16, 4, dtype=np.uint16)
_SHIFTS_7 = np.arange(0, 28, 7, dtype=np.uint32)
_POWERS_3 = np.array([[1], [3], [9], [27], [81]], np.uint8)


def dequantize(raw: np.ndarray, type: GGMLType, out: np.ndarray | None = None) -> np.ndarray:
    """Return the weights of rows of blocks.

    F32 comes back as a view of ``raw`` where that is possible; temporaries are otherwise a few hundred KB.

    Args:
        raw: uint8 (..., row bytes), whole blocks.
        type: of the tensor.
        out: float32 (..., n), C-contiguous, to be filled and returned.

    Raises:
        ModelError: the type is not in `SUPPORTED`.
        ValueError: ``raw`` or ``out`` has the wrong type or shape; a mistake of the caller.
    """
    if type not in SUPPORTED:
        raise ModelError(f"tensors of type {type.name} cannot be dequantized; use a file of another quantization")
    if raw.dtype != np.uint8 or raw.ndim == 0 or raw.shape[-1] % type.block_bytes:
        raise ValueError(f"{raw.dtype} {raw.shape} is not rows of {type.name} blocks")
    shape = (*raw.shape[:-1], raw.shape[-1] // type.block_bytes * type.block_size)
    if out is None:
        if type == GGMLType.F32 and raw.strides[-1] == 1:
            view = raw.view("<f4")
            if view.flags.aligned:
                return view
        out = np.empty(shape, np.float32)
    elif out.dtype != np.float32 or out.shape != shape or not out.flags.c_contiguous:
        raise ValueError(f"out is {out.dtype} {out.shape}, not contiguous float32 {shape}")
    # Infinite or undefined scales of a damaged file give undefined weights, as everywhere else, and no warnings.
    with np.errstate(over="ignore", invalid="ignore"):
        _fill(raw, type, out)
    return out


def _fill(raw: np.ndarray, type: GGMLType, out: np.ndarray) -> None:
    """Dequantize in chunks of whole blocks; rows that are not contiguous are copied a chunk at a time."""
    if raw.size == 0:
        return
    if raw.flags.c_contiguous:
        blocks, weights = raw.reshape(-1, type.block_bytes), out.reshape(-1, type.block_size)
        step = _CHUNK // type.block_size
        for i in range(0, len(blocks), step):
            _KERNELS[type](blocks[i : i + step], weights[i : i + step])
    elif raw.ndim == 1:
        _fill(np.ascontiguousarray(raw), type, out)
    elif (n := math.prod(out.shape[1:])) > _CHUNK:
        for part, weights in zip(raw, out, strict=True):
            _fill(part, type, weights)
    else:
        step = _CHUNK // n
        for i in range(0, len(raw), step):
            _fill(np.ascontiguousarray(raw[i : i + step]), type, out[i : i + step])


# Each kernel takes blocks, uint8 (B, block bytes), and fills float32 (B, block size).


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks.view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    np.left_shift(blocks.view("<u2"), np.uint32(16), out=out.view(np.uint32))


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """Return a float16 factor of each block as float32 (B, 1)."""
    return blocks[:, at : at + 2].copy().view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:
    """Return 4-bit numbers (B, n/run, 2, run): each run of bytes holds a run of low halves, then one of high halves."""
    runs = packed.reshape(len(packed), -1, run)
    halves = np.empty((*runs.shape[:2], 2, run), np.uint8)
    np.bitwise_and(runs, 15, out=halves[:, :, 0])
    np.right_shift(runs, 4, out=halves[:, :, 1])
    return halves


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _nibbles(blocks[:, 2:], 16).reshape(out.shape).view(np.int8)
    q -= 8
    np.multiply(_half(blocks, 0), q, out=out)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_half(blocks, 0), _nibbles(blocks[:, 4:], 16).reshape(out.shape), out=out)
    out += _half(blocks, 2)


def _five_bits(bits: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Return numbers (B, 32) of 5 bits: bit i of the 4 bytes ``bits`` is the highest of number i."""
    q = np.unpackbits(bits, axis=1, bitorder="little")
    q <<= 4
    q |= _nibbles(packed, 16).reshape(q.shape)
    return q


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _five_bits(blocks[:, 2:6], blocks[:, 6:]).view(np.int8)
    q -= 16
    np.multiply(_half(blocks, 0), q, out=out)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_half(blocks, 0), _five_bits(blocks[:, 4:8], blocks[:, 8:]), out=out)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    np.multiply(_half(blocks, 0), blocks[:, 2:].view(np.int8), out=out)


def _scaled(out: np.ndarray, scales: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Fill ``out`` with q times the scale of each sub-block (B, number of scales); returns it as sub-blocks."""
    parts = out.reshape(*scales.shape, -1)
    np.multiply(scales[:, :, None], q.reshape(parts.shape), out=parts)
    return parts


def _two_bits(packed: np.ndarray) -> np.ndarray:
    """Return 2-bit numbers (B, n/32, 4, 32): each 32 bytes hold four runs of 32, from the lowest bits up."""
    q = packed.reshape(len(packed), -1, 1, 32) >> _SHIFTS_2
    q &= 3
    return q


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales = blocks[:, :16]
    parts = _scaled(out, _half(blocks, 80) * (scales & 15), _two_bits(blocks[:, 16:80]))
    parts -= (_half(blocks, 82) * (scales >> 4))[:, :, None]


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # 16 scales of 6 bits: low halves of the first 8 bytes, then their high halves; the upper 2 bits are in the last 4.
    low = _nibbles(blocks[:, 96:104], 8).reshape(-1, 16)
    high = (blocks[:, None, 104:108] >> _SHIFTS_2 & 3).reshape(-1, 16)
    scales = (low | high << 4).view(np.int8) - np.int8(32)
    q = _two_bits(blocks[:, 32:96]).reshape(-1, 8, 32)
    # A clear bit of the mask, not a set one, means minus 4.
    q |= (blocks[:, None, :32] >> _SHIFTS_1 & 1) << 2
    signed = q.view(np.int8)
    signed -= 4
    _scaled(out, _half(blocks, 108) * scales, signed)


def _six_bit_scales(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return scales and minima (B, 8) from 12 bytes.

    Four scales and four minima fill 6 bits of a byte each; the other eight have their low halves in the last four bytes
    and their upper bits in the top of the first eight.
    """
    first, second, rest = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = np.concatenate([first & 63, (rest & 15) | (first >> 6 << 4)], axis=1)
    minima = np.concatenate([second & 63, (rest >> 4) | (second >> 6 << 4)], axis=1)
    return scales, minima


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    parts = _scaled(out, _half(blocks, 0) * scales, _nibbles(blocks[:, 16:], 32))
    parts -= (_half(blocks, 2) * minima)[:, :, None]


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    scales, minima = _six_bit_scales(blocks[:, 4:16])
    q = _nibbles(blocks[:, 48:], 32).reshape(-1, 8, 32)
    q |= (blocks[:, None, 16:48] >> _SHIFTS_1 & 1) << 4
    parts = _scaled(out, _half(blocks, 0) * scales, q)
    parts -= (_half(blocks, 2) * minima)[:, :, None]


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _nibbles(blocks[:, :128], 64).reshape(-1, 2, 4, 32)
    q |= _two_bits(blocks[:, 128:192]) << 4
    signed = q.view(np.int8)
    signed -= 32
    _scaled(out, _half(blocks, 208) * blocks[:, 192:208].view(np.int8), signed)


def _iq4_nl(blocks: np.ndarray, out: np.ndarray) -> None:
    np.take(_IQ4_VALUES, _nibbles(blocks[:, 2:], 16).reshape(out.shape), out=out, mode="clip")
    out *= _half(blocks, 0)


def _iq4_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    # 8 scales of 6 bits: low halves in 4 bytes, the upper 2 bits in 2.
    low = np.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], axis=2).reshape(-1, 8)
    high = (blocks[:, 2:4, None] >> _SHIFTS_2[:, 0] & 3).reshape(-1, 8)
    scales = _half(blocks, 0) * ((low | high << 4).view(np.int8) - np.int8(32))
    np.take(_IQ4_VALUES, _nibbles(blocks[:, 8:], 16).reshape(out.shape), out=out, mode="clip")
    parts = out.reshape(-1, 8, 32)
    parts *= scales[:, :, None]


def _mxfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    # Half of the E8M0 scale, 2^(e - 128); the two smallest are subnormal.
    e = blocks[:, :1].astype(np.uint32)
    bits = np.where(e < 2, np.uint32(0x00200000) << np.minimum(e, 1), (np.maximum(e, 1) - 1) << 23)
    np.take(_MXFP4_VALUES, _nibbles(blocks[:, 1:], 16).reshape(out.shape), out=out, mode="clip")
    out *= bits.astype(np.uint32).view(np.float32)


def _nvfp4(blocks: np.ndarray, out: np.ndarray) -> None:
    np.take(_MXFP4_VALUES, _nibbles(blocks[:, 4:], 8).reshape(out.shape), out=out, mode="clip")
    parts = out.reshape(-1, 4, 16)
    parts *= _UE4M3_HALVES[blocks[:, :4]][:, :, None]


def _q1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little").view(np.int8)
    q <<= 1
    q -= 1
    np.multiply(_half(blocks, 0), q, out=out)


def _q2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = (blocks[:, 2:, None] >> _SHIFTS_2[:, 0] & 3).reshape(out.shape).view(np.int8)
    q -= 1
    np.multiply(_half(blocks, 0), q, out=out)


def _tq1_0(blocks: np.ndarray, out: np.ndarray) -> None:
    # A byte is a fraction in base 3 of five digits (four in the last four bytes): times 3^i, modulo 1, it begins with
    # digit i. Runs of bytes give all their first digits, then all their second ones.
    start = 0
    for at, run, n_digits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        fraction = blocks[:, None, at : at + run] * _POWERS_3[:n_digits]
        digits = (fraction * np.uint16(3) >> 8).astype(np.int8).reshape(len(blocks), -1)
        digits -= 1
        stop = start + run * n_digits
        np.multiply(_half(blocks, 52), digits, out=out[:, start:stop])
        start = stop


def _tq2_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = _two_bits(blocks[:, :64]).reshape(out.shape).view(np.int8)
    q -= 1
    np.multiply(_half(blocks, 64), q, out=out)


def _integers(blocks: np.ndarray, start: int, stop: int, dtype: str) -> np.ndarray:
    """Return some bytes of each block as little-endian integers (B, n); blocks need not be aligned."""
    return blocks[:, start:stop].copy().view(dtype)


def _odd_scales(d: np.ndarray, numbers: np.ndarray, unit: float) -> np.ndarray:
    """Return d (2 n + 1) unit, which is exact for float16 d, small integers n and powers of 2."""
    return d * (2 * numbers.astype(np.float32) + 1) * np.float32(unit)


def _signed(sizes: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return int8 weights, those of ``sizes`` (vectors of a codebook, contiguous) negated where ``signs`` has a -1."""
    q, minus = sizes.view(np.int8), signs.reshape(len(sizes), -1).view(np.int8)
    q ^= minus
    q -= minus
    return q


def _iq2_xxs(blocks: np.ndarray, out: np.ndarray) -> None:
    # Each 8 bytes: 4 numbers of vectors, then 4 times 7 bits of signs and a scale of 4 bits.
    words = _integers(blocks, 2, 66, "<u4")[:, 1::2, None]
    sizes = grids.IQ2_XXS[blocks[:, 2:].reshape(-1, 8, 8)[:, :, :4].reshape(-1, 32)]
    q = _signed(sizes, grids.EVEN_SIGNS[words >> _SHIFTS_7 & 127])
    _scaled(out, _odd_scales(_half(blocks, 0), words[:, :, 0] >> 28, 1 / 8), q)


def _iq2_xs(blocks: np.ndarray, out: np.ndarray) -> None:
    words = _integers(blocks, 2, 66, "<u2")
    q = _signed(grids.IQ2_XS[words & 511], grids.EVEN_SIGNS[words >> 9])
    scales = _nibbles(blocks[:, 66:], 1).reshape(-1, 16)
    _scaled(out, _odd_scales(_half(blocks, 0), scales, 1 / 8), q)


def _iq2_s(blocks: np.ndarray, out: np.ndarray) -> None:
    index = (blocks[:, 66:74, None] >> _SHIFTS_2[:, 0] & 3).reshape(-1, 32).astype(np.uint16) << 8 | blocks[:, 2:34]
    q = _signed(grids.IQ2_S[index], grids.SIGNS[blocks[:, 34:66]])
    scales = _nibbles(blocks[:, 74:], 1).reshape(-1, 16)
    _scaled(out, _odd_scales(_half(blocks, 0), scales, 1 / 8), q)


def _iq3_xxs(blocks: np.ndarray, out: np.ndarray) -> None:
    # As iq2_xxs, with all numbers of vectors first.
    words = _integers(blocks, 66, 98, "<u4")[:, :, None]
    q = _signed(grids.IQ3_XXS[blocks[:, 2:66]], grids.EVEN_SIGNS[words >> _SHIFTS_7 & 127])
    _scaled(out, _odd_scales(_half(blocks, 0), words[:, :, 0] >> 28, 1 / 4), q)


def _iq3_s(blocks: np.ndarray, out: np.ndarray) -> None:
    index = np.unpackbits(blocks[:, 66:74], axis=1, bitorder="little").astype(np.uint16) << 8 | blocks[:, 2:66]
    q = _signed(grids.IQ3_S[index], grids.SIGNS[blocks[:, 74:106]])
    scales = _nibbles(blocks[:, 106:], 1).reshape(-1, 8)
    _scaled(out, _odd_scales(_half(blocks, 0), scales, 1), q)


def _iq1_s(blocks: np.ndarray, out: np.ndarray) -> None:
    # Each word: 4 times the upper 3 bits of a vector's number, a scale of 3 bits, the sign of the shift.
    words = _integers(blocks, 34, 50, "<u2")
    index = (words[:, :, None] >> _SHIFTS_3 & 7).reshape(-1, 32) << 8 | blocks[:, 2:34]
    q = grids.IQ1[index].view(np.int8).reshape(-1, 8, 32)
    q += np.where(words >> 15, np.int8(-1), np.int8(1))[:, :, None]
    _scaled(out, _odd_scales(_half(blocks, 0), words >> 12 & 7, 1 / 8), q)


def _iq1_m(blocks: np.ndarray, out: np.ndarray) -> None:
    # Each word: 4 scales of 3 bits, and 4 bits of the block's float16 factor, the lowest first.
    words = _integers(blocks, 48, 56, "<u2")
    factor = np.bitwise_or.reduce(words >> 12 << _SHIFTS_4, axis=1, keepdims=True).view(np.float16)
    scales = (words[:, :, None] >> _SHIFTS_3 & 7).reshape(-1, 16)
    high = _nibbles(blocks[:, 32:48], 1).reshape(-1, 32)
    q = grids.IQ1[(high & 7).astype(np.uint16) << 8 | blocks[:, :32]].view(np.int8).reshape(-1, 32, 8)
    q += np.where(high >> 3, np.int8(-1), np.int8(1))[:, :, None]
    _scaled(out, _odd_scales(factor.astype(np.float32), scales, 1 / 8), q)


_KERNELS: dict[GGMLType, Callable[[np.ndarray, np.ndarray], None]] = {
    GGMLType.F32: _f32,
    GGMLType.F16: _f16,
    GGMLType.BF16: _bf16,
    GGMLType.Q4_0: _q4_0,
    GGMLType.Q4_1: _q4_1,
    GGMLType.Q5_0: _q5_0,
    GGMLType.Q5_1: _q5_1,
    GGMLType.Q8_0: _q8_0,
    GGMLType.Q2_K: _q2_k,
    GGMLType.Q3_K: _q3_k,
    GGMLType.Q4_K: _q4_k,
    GGMLType.Q5_K: _q5_k,
    GGMLType.Q6_K: _q6_k,
    GGMLType.IQ4_NL: _iq4_nl,
    GGMLType.IQ4_XS: _iq4_xs,
    GGMLType.MXFP4: _mxfp4,
    GGMLType.NVFP4: _nvfp4,
    GGMLType.Q1_0: _q1_0,
    GGMLType.Q2_0: _q2_0,
    GGMLType.TQ1_0: _tq1_0,
    GGMLType.TQ2_0: _tq2_0,
    GGMLType.IQ1_S: _iq1_s,
    GGMLType.IQ1_M: _iq1_m,
    GGMLType.IQ2_XXS: _iq2_xxs,
    GGMLType.IQ2_XS: _iq2_xs,
    GGMLType.IQ2_S: _iq2_s,
    GGMLType.IQ3_XXS: _iq3_xxs,
    GGMLType.IQ3_S: _iq3_s,
}

SUPPORTED: frozenset[GGMLType] = frozenset(_KERNELS)
"""The types that `dequantize` knows."""
