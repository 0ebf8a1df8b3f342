"""Dequantization against the gguf package, on random bytes and on quantized weights, to the bit."""

import tracemalloc
import warnings

import gguf
import numpy as np
import pytest

from mpillama.backends.quants import SUPPORTED, dequantize
from mpillama.errors import ModelError
from mpillama.gguf.types import GGMLType, row_bytes

TYPES = sorted(SUPPORTED)
each_type = pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)


def oracle(raw: np.ndarray, type: GGMLType) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gguf.quants.dequantize(raw, gguf.GGMLQuantizationType(int(type)))


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    both_nan = np.isnan(got) & np.isnan(expected)
    np.testing.assert_array_equal(
        np.where(both_nan, 0, got.view(np.uint32)), np.where(both_nan, 0, expected.view(np.uint32))
    )


def random_rows(rng, type: GGMLType, *lead: int, n_blocks: int = 3) -> np.ndarray:
    return rng.integers(0, 256, (*lead, n_blocks * type.block_bytes), dtype=np.uint8)


def test_the_types_that_are_promised():
    promised = "F32 F16 BF16 Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"
    assert {type.name for type in SUPPORTED} >= set(promised.split())


@each_type
def test_random_bytes(type, rng):
    # 5000 blocks: any scale, any quant, infinities and not-a-numbers, none of which may warn.
    raw = random_rows(rng, type, 50, n_blocks=100)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = dequantize(raw, type)
    assert_same_bits(got, oracle(raw, type))


@each_type
def test_every_byte_at_every_place_of_a_block(type, rng):
    block = random_rows(rng, type, 1, n_blocks=1)
    raw = np.repeat(block, 256 * type.block_bytes, axis=0).reshape(type.block_bytes, 256, -1)
    for at in range(type.block_bytes):
        raw[at, :, at] = np.arange(256)
    assert_same_bits(dequantize(raw, type), oracle(raw, type))


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
def test_quantized_weights_come_back_nearly(name, rng):
    type = GGMLType[name]
    weights = rng.standard_normal((8, 512)).astype(np.float32)
    raw = gguf.quants.quantize(weights, gguf.GGMLQuantizationType(int(type))).view(np.uint8)
    error = ((dequantize(raw, type) - weights) ** 2).mean()
    assert error < {32: 1e-13, 16: 1e-4, 8: 1e-3}.get(type.block_bytes * 8 // type.block_size, 2e-2)


@each_type
def test_shapes_and_out(type, rng):
    raw = random_rows(rng, type, 2, 3, 4)
    expected = oracle(raw, type)
    assert_same_bits(dequantize(raw, type), expected)
    assert_same_bits(dequantize(raw[0, 0, 0], type), expected[0, 0, 0])
    out = np.full(expected.shape, np.nan, np.float32)
    assert dequantize(raw, type, out) is out
    assert_same_bits(out, expected)
    for empty in (raw[:0], raw[:, :0], raw[..., :0]):
        n = empty.shape[-1] // type.block_bytes * type.block_size
        assert dequantize(empty, type).shape == (*empty.shape[:-1], n)


@each_type
def test_slices_that_are_not_contiguous(type, rng):
    raw = random_rows(rng, type, 4, 6, 6, n_blocks=5)
    columns = slice(type.block_bytes, 4 * type.block_bytes)
    for part in (raw[..., columns], raw[::2, 1:5:2], raw[:, :, ::-1], raw.transpose(1, 0, 2, 3)[0], raw[0, 0, 0, ::-1]):
        if part.ndim > 1 or part.size % type.block_bytes == 0:
            expected = oracle(np.ascontiguousarray(part), type)
            assert_same_bits(dequantize(part, type), expected)
            out = np.empty(expected.shape, np.float32)
            assert_same_bits(dequantize(part, type, out), expected)


@pytest.mark.parametrize("type", [GGMLType.F16, GGMLType.Q4_0, GGMLType.Q6_K], ids=lambda t: t.name)
def test_long_and_many_rows_that_are_not_contiguous(type, rng):
    # Rows longer than a chunk, and more short rows than fit into one.
    for n_rows, n_in in ((3, 1 << 17), (1500, 256)):
        raw = rng.integers(0, 256, (n_rows, row_bytes(type, 2 * n_in)), dtype=np.uint8)[:, : row_bytes(type, n_in)]
        assert_same_bits(dequantize(raw, type), oracle(np.ascontiguousarray(raw), type))


@each_type
def test_chunks_end_inside_the_last_rows(type, rng):
    raw = random_rows(rng, type, 70_000 // type.block_size * 3 + 1, n_blocks=1)
    assert_same_bits(dequantize(raw, type), oracle(raw, type))


@each_type
def test_memory_that_may_not_be_written(type, rng):
    raw = random_rows(rng, type, 3)
    before = raw.copy()
    raw.flags.writeable = False
    assert_same_bits(dequantize(raw, type), oracle(raw, type))
    np.testing.assert_array_equal(raw, before)


def test_f32_is_a_view(rng):
    raw = rng.integers(0, 256, (4, 6, 64), dtype=np.uint8)
    for part in (raw, raw[1, 2:], raw[..., 8:40], raw[0, 0]):
        weights = dequantize(part, GGMLType.F32)
        assert np.shares_memory(weights, raw)
        assert weights.flags.aligned


def test_f32_that_is_not_aligned_is_copied(rng):
    raw = rng.integers(0, 256, 4 * 8 + 1, dtype=np.uint8)[1:]
    weights = dequantize(raw, GGMLType.F32)
    assert weights.flags.aligned
    assert not np.shares_memory(weights, raw)
    assert weights.tobytes() == raw.tobytes()


@each_type
def test_temporaries_are_small(type, rng):
    raw = random_rows(rng, type, 16, n_blocks=(1 << 18) // type.block_size)
    for part in (raw, raw[:, type.block_bytes :]):
        out = np.empty((len(part), part.shape[1] // type.block_bytes * type.block_size), np.float32)
        tracemalloc.start()
        try:
            dequantize(part, type, out)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 2 << 20


def test_unknown_types_are_refused():
    for type in set(GGMLType) - SUPPORTED:
        with pytest.raises(ModelError, match=type.name):
            dequantize(np.zeros(type.block_bytes, np.uint8), type)


def test_wrong_arguments_are_refused():
    raw = np.zeros((2, 36), np.uint8)
    for bad in (raw[:, :35], raw.view(np.int8), np.zeros((), np.uint8)):
        with pytest.raises(ValueError, match="is not rows of Q4_0 blocks"):
            dequantize(bad, GGMLType.Q4_0)
    for out in (np.empty((2, 32), np.float32), np.empty((2, 64)), np.empty((64, 2), np.float32).T):
        with pytest.raises(ValueError, match="not contiguous float32"):
            dequantize(raw, GGMLType.Q4_0, out)
