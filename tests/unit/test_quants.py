"""Dequantization against the gguf package, to the bit, and within the memory it promises."""

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest

from mpillama.backends import quant_grids
from mpillama.backends.quants import SUPPORTED, dequantize
from mpillama.errors import ModelError
from mpillama.gguf.types import GGMLType, row_bytes
from tiny import random_blocks

TYPES = sorted(SUPPORTED)
by_name = pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)


def oracle(raw: np.ndarray, type: GGMLType) -> np.ndarray:
    """What the gguf package makes of it; the two types that it cannot expand are spelled out."""
    if type in (GGMLType.Q1_0, GGMLType.Q2_0):
        blocks = raw.reshape(-1, type.block_bytes)
        d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
        per_byte = type.block_size // 16
        numbers = [blocks[:, 2 + i // per_byte] >> i % per_byte * 8 // per_byte for i in range(type.block_size)]
        levels = [-1, 1] if type == GGMLType.Q1_0 else [-1, 0, 1, 2]
        weights = np.array(levels, np.float32)[np.stack(numbers, axis=1) & (len(levels) - 1)]
        with np.errstate(invalid="ignore"):
            return (weights * d).reshape(*raw.shape[:-1], -1 if raw.size else 0)
    if int(type) not in [int(known) for known in gguf.GGMLQuantizationType]:
        pytest.skip(f"the installed gguf package does not know {type.name}")
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(type))).astype(np.float32)


def assert_same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert (ours.dtype, ours.shape) == (np.float32, theirs.shape)
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def rows_of_blocks(rng: np.random.Generator, type: GGMLType, n_rows: int, n_weights: int) -> np.ndarray:
    n_in = -(-n_weights // type.block_size) * type.block_size
    return random_blocks(rng, type, (n_rows, n_in))


def test_every_type_that_models_are_made_of():
    promised = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 "
    promised += "IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S TQ1_0 TQ2_0 NVFP4 Q1_0 Q2_0"
    assert {t.name for t in SUPPORTED} == set(promised.split())


@by_name
def test_random_blocks_to_the_bit(type, rng):
    raw = rows_of_blocks(rng, type, 40, 512)
    theirs = oracle(raw, type)
    assert np.isfinite(theirs).all()
    assert len(np.unique(theirs)) > 8
    assert_same_bits(dequantize(raw, type), theirs)


@by_name
def test_random_bytes_and_no_warnings(type, rng):
    # All factors there are: zero, subnormal, negative, infinite, undefined.
    raw = rng.integers(0, 256, (300, row_bytes(type, 256)), dtype=np.uint8)
    theirs = oracle(raw, type)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = dequantize(raw, type)
    defined = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), ~defined)
    assert_same_bits(ours[defined], theirs[defined])


@by_name
def test_every_value_of_every_byte(type, rng):
    """Each byte of a block in turn takes all 256 values, so that no field is only right for small numbers."""
    block = random_blocks(rng, type, (type.block_size,)).reshape(-1)
    raw = np.repeat(block[None], 256 * len(block), axis=0).reshape(len(block), 256, -1)
    for i in range(len(block)):
        raw[i, :, i] = np.arange(256)
    raw = raw.reshape(-1, len(block))
    theirs = oracle(raw, type)
    ours = dequantize(raw, type)
    defined = ~np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), ~defined)
    assert_same_bits(ours[defined], theirs[defined])


def test_scales_of_mxfp4():
    raw = np.zeros((256, 17), np.uint8)
    raw[:, 0] = np.arange(256)
    raw[:, 1] = 0x92  # 1 in the low half (element 0), -0.5 in the high half (element 16).
    got = dequantize(raw, GGMLType.MXFP4)
    np.testing.assert_array_equal(got[:255, 0], np.ldexp(1.0, np.arange(255) - 127).astype(np.float32))
    np.testing.assert_array_equal(got[:255, 16], -got[:255, 0] / 2)
    np.testing.assert_array_equal(got[:, 1:16], 0)


def test_scales_of_nvfp4():
    """Four scales a block, each E4M3 without its sign."""
    raw = np.zeros((64, 36), np.uint8)
    raw[:, :4] = np.arange(256).reshape(64, 4)
    raw[:, 4::8] = 0x92  # 1 in the low half (elements 0, 16, ...), -0.5 in the high half (elements 8, 24, ...).
    got = dequantize(raw, GGMLType.NVFP4).reshape(256, 16)
    known = {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x3C: 1.5, 0x7E: 448, 0x7F: 0, 0xB8: 1}
    for byte, scale in known.items():
        assert got[byte].tolist() == [scale, *[0] * 7, -scale / 2, *[0] * 7], byte
    assert (np.diff(got[:127, 0]) > 0).all()


def test_few_bits_by_hand():
    """The orders of weights in a byte, for types without a second opinion and their like."""
    half = [0x00, 0x38]  # 0.5
    q1 = dequantize(np.array([*half, 0b00000101, *[0] * 14, 0x80], np.uint8), GGMLType.Q1_0)
    assert np.flatnonzero(q1 == 0.5).tolist() == [0, 2, 127]
    assert np.count_nonzero(q1 == -0.5) == 125
    q2 = dequantize(np.array([*half, 0b11100100, *[0b01010101] * 15], np.uint8), GGMLType.Q2_0)
    assert q2.tolist() == [-0.5, 0, 0.5, 1, *[0] * 60]
    tq2 = dequantize(np.array([0b11100100, *[0b01010101] * 63, *half], np.uint8), GGMLType.TQ2_0)
    assert {int(i): float(tq2[i]) for i in np.flatnonzero(tq2)} == {0: -0.5, 64: 0.5, 96: 1}


@pytest.mark.parametrize("name", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_codebooks(name):
    """Every vector, at its place: random blocks do not reach all 2048 of them."""
    theirs = getattr(gguf.quants, name)
    theirs.init_grid()
    ours = getattr(quant_grids, name.replace("IQ1_S", "IQ1"))
    vectors = ours.view(np.int8).reshape(len(ours), -1)
    np.testing.assert_array_equal(vectors / (8 if name == "IQ1_S" else 1), theirs.grid.reshape(theirs.grid_shape))


def test_signs():
    for number in range(256):
        signs = [-(number >> i & 1) for i in range(8)]
        assert quant_grids.SIGNS[number : number + 1].view(np.int8).tolist() == signs
        if sum(signs) % 2 == 0:
            assert quant_grids.EVEN_SIGNS[number % 128] == quant_grids.SIGNS[number]


@by_name
@pytest.mark.parametrize("lead", [(), (0,), (1,), (3, 2), (2, 0, 5), (2, 1, 3)], ids=str)
def test_leading_axes(type, lead, rng):
    n_in = max(type.block_size, 4) * 3
    raw = random_blocks(rng, type, (*lead, n_in))
    got = dequantize(raw, type)
    assert got.shape == (*lead, n_in)
    assert got.dtype == np.float32
    if raw.size:
        assert_same_bits(got, oracle(raw, type))


@by_name
def test_rows_of_no_weights(type):
    assert dequantize(np.empty((3, 0), np.uint8), type).shape == (3, 0)


@by_name
def test_more_than_one_chunk(type, rng):
    """Sizes on both sides of several chunk boundaries give what single rows give."""
    # Random contents of one small tensor, repeated at random, so that the oracle need not run over megabytes.
    rows = rows_of_blocks(rng, type, 7, 256)
    weights = oracle(rows, type)
    for n_rows in (255, 256, 257, 512, 513, 1000):
        pick = rng.integers(0, len(rows), n_rows)
        assert_same_bits(dequantize(rows[pick], type), weights[pick])
    wide = rng.integers(0, len(rows), 300)
    got = dequantize(rows[wide].reshape(1, -1), type)
    assert_same_bits(got.reshape(300, -1), weights[wide])


@by_name
@pytest.mark.parametrize(
    "view",
    [
        lambda raw, b: raw[::2],
        lambda raw, b: raw[::-1],
        lambda raw, b: raw.transpose(1, 0, 2),
        lambda raw, b: raw[:, 3:17],
        lambda raw, b: raw[:, :, 2 * b : 6 * b],
        lambda raw, b: raw[:, 1, b:],
        lambda raw, b: np.broadcast_to(raw[0, 0], (5, raw.shape[-1])),
    ],
    ids=["every second", "backwards", "transposed", "middle", "columns", "part of rows", "broadcast"],
)
def test_memory_that_is_not_contiguous(type, view, rng):
    n_in = max(8 * type.block_size, 16)
    raw = view(random_blocks(rng, type, (6, 20, n_in)), row_bytes(type, n_in) // 8)
    assert_same_bits(dequantize(raw, type), oracle(np.ascontiguousarray(raw), type))


@by_name
def test_bytes_that_are_not_next_to_each_other(type, rng):
    spread = np.zeros((4, 2 * row_bytes(type, 256)), np.uint8)
    spread[:, ::2] = random_blocks(rng, type, (4, 256))
    assert_same_bits(dequantize(spread[:, ::2], type), oracle(spread[:, ::2].copy(), type))
    assert_same_bits(dequantize(spread[2, ::2], type), oracle(spread[2, ::2].copy(), type))


@by_name
def test_wide_rows_that_are_not_contiguous(type, rng):
    n_in = 1 << 17
    small = random_blocks(rng, type, (4, 256))
    raw = np.tile(small, (1, n_in // 256))[::2]
    assert_same_bits(dequantize(raw, type), np.tile(oracle(small, type), (1, n_in // 256))[::2])


@by_name
def test_any_address(type, rng):
    raw = random_blocks(rng, type, (3, 256))
    for shift in range(1, 4):
        moved = np.empty(raw.size + shift, np.uint8)[shift:].reshape(raw.shape)
        moved[:] = raw
        assert_same_bits(dequantize(moved, type), oracle(raw, type))


@by_name
def test_the_input_is_not_written(type, rng):
    raw = random_blocks(rng, type, (5, 256))
    before = raw.copy()
    raw.flags.writeable = False
    dequantize(raw, type)
    np.testing.assert_array_equal(raw, before)


@by_name
def test_into_given_memory(type, rng):
    raw = random_blocks(rng, type, (5, 256))
    out = np.full((5, 256), np.nan, np.float32)
    assert dequantize(raw, type, out) is out
    assert_same_bits(out, oracle(raw, type))
    for wrong in (np.empty((5, 255), np.float32), np.empty((5, 256)), np.empty((256, 5), np.float32).T):
        with pytest.raises(ValueError, match="out is"):
            dequantize(raw, type, wrong)


def test_f32_is_a_view(rng):
    raw = random_blocks(rng, GGMLType.F32, (6, 8))
    assert np.shares_memory(dequantize(raw, GGMLType.F32), raw)
    assert np.shares_memory(dequantize(raw[1::2, 4:12], GGMLType.F32), raw)
    shifted = np.zeros(33, np.uint8)[1:]
    assert not np.shares_memory(dequantize(shifted, GGMLType.F32), shifted)


@pytest.mark.parametrize("layout", ["contiguous", "rows", "transposed", "one row"])
@by_name
def test_temporaries_stay_small(type, layout, rng):
    n_rows, n_in = 512, 8192
    raw = np.tile(random_blocks(rng, type, (1, n_in)), (n_rows, 1))
    raw = {
        "contiguous": lambda: raw,
        "rows": lambda: raw[::2],
        "transposed": lambda: raw.reshape(64, 8, -1).transpose(1, 0, 2),
        "one row": lambda: raw.reshape(1, -1),
    }[layout]()
    n_weights = raw.size // type.block_bytes * type.block_size
    tracemalloc.start()
    try:
        dequantize(raw, type, np.empty((*raw.shape[:-1], n_weights // (raw.size // raw.shape[-1])), np.float32))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak - 4 * n_weights < 4 << 20


@pytest.mark.parametrize("type", sorted(set(GGMLType) - SUPPORTED), ids=lambda t: t.name)
def test_other_types_are_named(type):
    with pytest.raises(ModelError, match=rf"type {type.name} cannot"):
        dequantize(np.zeros((1, type.block_bytes), np.uint8), type)


def test_mistakes_of_the_caller():
    for raw in (np.zeros((2, 35), np.uint8), np.zeros((2, 34), np.int8), np.uint8(3).reshape(())):
        with pytest.raises(ValueError, match="not rows of Q8_0 blocks"):
            dequantize(raw, GGMLType.Q8_0)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantized_weights_come_back_nearly(name, rng):
    type = GGMLType[name]
    weights = rng.standard_normal((8, 512)).astype(np.float32)
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(int(type))).view(np.uint8)
    error = ((dequantize(raw, type) - weights) ** 2).mean()
    assert error < {32: 1e-13, 16: 1e-4, 8: 1e-3}.get(type.block_bytes * 8 // type.block_size, 2e-2)


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_weights_come_back(name, rng):
    weights = rng.integers(-1, 2, (8, 512)).astype(np.float32) * 0.75
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(dequantize(raw, GGMLType[name]), weights)
