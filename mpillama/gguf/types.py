"""The tensor types of GGUF: their numbers, how many weights a block holds and how many bytes it takes.

Numbers and block layouts are those of ``enum ggml_type`` (ggml.h) and of the block structs (ggml-common.h).
"""

from __future__ import annotations

from enum import IntEnum


class GGMLType(IntEnum):
    """How the weights of a tensor are stored. A row (the in axis) is a whole number of blocks.

    Attributes:
        block_size: weights in a block.
        block_bytes: bytes of a block.
    """

    block_size: int
    block_bytes: int

    def __new__(cls, number: int, block_size: int = 0, block_bytes: int = 0) -> GGMLType:
        """Make a member from its row below; type checkers take a lookup by number for a call, hence the defaults."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.block_size = block_size
        member.block_bytes = block_bytes
        return member

    F32 = 0, 1, 4
    F16 = 1, 1, 2
    Q4_0 = 2, 32, 18
    Q4_1 = 3, 32, 20
    Q5_0 = 6, 32, 22
    Q5_1 = 7, 32, 24
    Q8_0 = 8, 32, 34
    Q8_1 = 9, 32, 40
    Q2_K = 10, 256, 84
    Q3_K = 11, 256, 110
    Q4_K = 12, 256, 144
    Q5_K = 13, 256, 176
    Q6_K = 14, 256, 210
    Q8_K = 15, 256, 292
    IQ2_XXS = 16, 256, 66
    IQ2_XS = 17, 256, 74
    IQ3_XXS = 18, 256, 98
    IQ1_S = 19, 256, 50
    IQ4_NL = 20, 32, 18
    IQ3_S = 21, 256, 110
    IQ2_S = 22, 256, 82
    IQ4_XS = 23, 256, 136
    I8 = 24, 1, 1
    I16 = 25, 1, 2
    I32 = 26, 1, 4
    I64 = 27, 1, 8
    F64 = 28, 1, 8
    IQ1_M = 29, 256, 56
    BF16 = 30, 1, 2
    TQ1_0 = 34, 256, 54
    TQ2_0 = 35, 256, 66
    MXFP4 = 39, 32, 17
    NVFP4 = 40, 64, 36
    Q1_0 = 41, 128, 18
    Q2_0 = 42, 64, 18


REMOVED_TYPES = frozenset({4, 5, 31, 32, 33, 36, 37, 38})
"""Numbers of types that GGUF once had: Q4_2, Q4_3, and Q4_0 and IQ4_NL with interleaved rows."""


def row_bytes(type: GGMLType, n: int) -> int:
    """Return the bytes of ``n`` consecutive weights.

    Raises:
        ValueError: ``n`` is not a whole number of blocks.
    """
    blocks, rest = divmod(n, type.block_size)
    if rest:
        raise ValueError(f"{n} weights are not a whole number of {type.name} blocks of {type.block_size}")
    return blocks * type.block_bytes
