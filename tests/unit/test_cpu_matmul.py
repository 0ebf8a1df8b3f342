"""Products with packed weights against the same products in float64, for every type, level and odd shape."""

import os
import signal
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

import machine_code
from mpillama.backends.base import RawWeight
from mpillama.backends.quants import SUPPORTED, dequantize
from mpillama.gguf.types import GGMLType, row_bytes
from products import error, make_weight, product_error
from tiny import random_blocks
from tiny import rounded_to_int8 as rounded

_cpu = pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.backend import PACKED, CpuBackend  # noqa: E402

# Where there is no AMX, the same machine code is still run, an instruction at a time.
_cpu.trap_tiles()
LEVELS = _cpu.levels()
TYPES = sorted(PACKED)
FLOATS = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}


def in_bf16(type, level, n_tokens):
    """Whether so many tokens of a matrix are multiplied on AMX, which has no way to codebooks."""
    return (
        level == "amx" and n_tokens >= 24 and type != GGMLType.F32 and not type.name.startswith(("IQ1", "IQ2", "IQ3"))
    )


def some_width(rng, type):
    return int(rng.integers(1, 200)) if type in FLOATS else int(rng.integers(1, 7)) * type.block_size


def expect(y, x, w, type, level, n_tokens):
    """Compare a product with what the level should make of it."""
    if in_bf16(type, level, n_tokens):
        assert product_error(y, x.astype(np.float64), w) < 4e-3
    elif type in FLOATS:
        assert product_error(y, x.astype(np.float64), w) < 1e-6
    else:
        assert product_error(y, rounded(x), w) < 2e-6


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_linear(type, level, rng):
    for n_threads in (1, 2, 3):
        backend = CpuBackend(n_threads, (), level)
        for n_tokens in (1, 2, *rng.integers(3, 41, 3).tolist()):
            n_rows, n_in = int(rng.integers(1, 90)), some_width(rng, type)
            w, floats = make_weight(rng, backend, type, 1, n_rows, n_in)
            x = rng.standard_normal((n_tokens, n_in)).astype(np.float32)
            y = backend.linear(x, w)
            assert y.shape == (n_tokens, n_rows)
            assert y.dtype == np.float32
            expect(y, x, floats[0], type, level, n_tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", [type for type in TYPES if type not in FLOATS], ids=lambda t: t.name)
def test_the_largest_codes_and_activations(type, level, rng):
    """Sums of 16 bits hold what they are given, whatever the codes."""
    backend = CpuBackend(1, (), level)
    n_in = 2 * type.block_size
    for byte in (0x00, 0x0F, 0x7F, 0x80, 0xF0, 0xFF):
        raw = random_blocks(rng, type, (1, 16, n_in), byte=byte)
        w = backend.weight(RawWeight("w", type, raw, n_in))
        floats = dequantize(raw, type).astype(np.float64)
        for n_tokens in (1, 2, 16):
            x = np.repeat(rng.choice([-1.0, 1.0], (n_tokens, 1)), n_in, axis=1).astype(np.float32)
            reference, size = rounded(x) @ floats[0].T, np.linalg.norm(np.abs(x) @ np.abs(floats[0].T))
            assert error(backend.linear(x, w), reference, size) < 2e-6


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_rows_in_pieces_and_any_order(type, rng):
    backend = CpuBackend(2)
    n_mats, n_rows, n_in = int(rng.integers(1, 4)), int(rng.integers(1, 90)), some_width(rng, type)
    raw = random_blocks(rng, type, (n_mats, n_rows, n_in))
    whole = backend.weight(RawWeight("w", type, raw, n_in, (0, 0)))
    edges = [
        mat * n_rows + row for mat in range(n_mats) for row in range(0, n_rows, 16) if not row or rng.random() < 0.6
    ]
    pieces = list(pairwise([*edges, n_mats * n_rows]))
    w, rows = backend.new_weight(type, n_mats, n_rows, n_in, (0, 0)), raw.reshape(n_mats * n_rows, -1)
    for i in rng.permutation(len(pieces)):
        first, stop = pieces[i]
        backend.fill(w, first, rows[first:stop])
    x, experts = rng.standard_normal((n_mats, n_in)).astype(np.float32), np.arange(n_mats)[:, None]
    np.testing.assert_array_equal(backend.expert_linear(x, w, experts), backend.expert_linear(x, whole, experts))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_large_products_are_as_exact_as_the_format(type, level, rng):
    backend = CpuBackend(2, (), level)
    w, floats = make_weight(rng, backend, type, 1, 200, 2048)
    x = rng.standard_normal((37, 2048)).astype(np.float32)
    for n_tokens in (17, 37):
        found = error(backend.linear(x[:n_tokens], w), x[:n_tokens].astype(np.float64) @ floats[0].T)
        # Both roundings are real ones, of a known size: nothing computes more exactly than it should, either.
        if in_bf16(type, level, n_tokens):
            assert 1e-3 < found < 3e-3
        elif type in FLOATS:
            assert found < 1e-6
        else:
            assert 1e-3 < found < 9e-3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_pads_meet_zeros(type, level, rng):
    """A rank's range of columns may begin and end anywhere within its blocks."""
    backend = CpuBackend(2, (), level)
    for n_tokens in (1, 7, 33):
        n_in = some_width(rng, type) + 3 * type.block_size
        pad = tuple(rng.integers(0, n_in // 2, 2).tolist())
        w, floats = make_weight(rng, backend, type, 1, 45, n_in, pad)
        x = rng.standard_normal((n_tokens, n_in - sum(pad))).astype(np.float32)
        expect(backend.linear(x, w), np.pad(x, ((0, 0), pad)), floats[0], type, level, n_tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_experts(type, level, rng):
    backend = CpuBackend(2, (), level)
    n_mats, n_rows = 9, 37
    for n_tokens, n_used, n_distinct in ((1, 4, 9), (5, 2, 9), (40, 3, 3), (33, 1, 1)):
        n_in = some_width(rng, type)
        w, floats = make_weight(rng, backend, type, n_mats, n_rows, n_in)
        experts = np.array([rng.permutation(n_distinct)[:n_used] for _ in range(n_tokens)])
        shared = rng.standard_normal((n_tokens, n_in)).astype(np.float32)
        own = rng.standard_normal((n_tokens, n_used, n_in)).astype(np.float32)
        for x in (shared, own):
            y = backend.expert_linear(x, w, experts)
            assert y.shape == (n_tokens, n_used, n_rows)
            for expert in np.unique(experts):
                token, slot = np.nonzero(experts == expert)
                inputs = x[token] if x.ndim == 2 else x[token, slot]
                expect(y[token, slot], inputs, floats[expert], type, level, len(token))


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_embedding_is_the_file_s_row(type, rng):
    backend = CpuBackend(2)
    n_in = some_width(rng, type)
    w, floats = make_weight(rng, backend, type, 1, 70, n_in)
    tokens = rng.integers(0, 200, 50).astype(np.int32)
    y = backend.embedding(tokens, w, 100)
    here = (tokens >= 100) & (tokens < 170)
    assert here.any()
    np.testing.assert_allclose(y[here], floats[0, tokens[here] - 100], rtol=1e-6, atol=0)
    assert not y[~here].any()


@pytest.mark.parametrize("level", LEVELS)
def test_threads_do_not_change_a_bit(level, rng):
    types = (GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.F16)
    raws = {type: random_blocks(rng, type, (1, 333, 512)) for type in types}
    x = rng.standard_normal((39, 512)).astype(np.float32)
    results = []
    for n_threads in (1, 2, 3):
        backend = CpuBackend(n_threads, (), level)
        weights = [backend.weight(RawWeight("w", type, raw, 512)) for type, raw in raws.items()]
        results.append([backend.linear(x[:n], w) for w in weights for n in (1, 5, 39)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "amx"])
def test_company_does_not_change_a_token(level, rng):
    """A token's quantized products are the same alone and among others."""
    backend = CpuBackend(2, (), level)
    for type in (GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.Q2_K):
        w, _ = make_weight(rng, backend, type, 1, 50, 768)
        x = rng.standard_normal((31, 768)).astype(np.float32)
        together = backend.linear(x, w)
        for i in range(31):
            np.testing.assert_array_equal(backend.linear(x[i : i + 1], w)[0], together[i])


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_do(level, rng):
    backend = CpuBackend(2, (), level)
    w, _ = make_weight(rng, backend, GGMLType.Q4_K, 3, 40, 256)
    assert backend.linear(np.zeros((0, 256), np.float32), w).shape == (0, 40)
    empty = np.zeros((0, 2), np.int64)
    assert backend.expert_linear(np.zeros((0, 256), np.float32), w, empty).shape == (0, 2, 40)
    assert backend.embedding(np.zeros(0, np.int32), w, 0).shape == (0, 256)
    for type in (GGMLType.F32, GGMLType.Q4_0, GGMLType.Q6_K):
        x = rng.standard_normal((25, 256)).astype(np.float32)
        no_rows = backend.weight(RawWeight("w", type, np.zeros((1, 0, row_bytes(type, 256)), np.uint8), 256))
        assert backend.linear(x, no_rows).shape == (25, 0)
        no_columns = backend.weight(RawWeight("w", type, np.zeros((2, 21, 0), np.uint8), 0))
        for n_tokens in (1, 25):
            y = backend.linear(np.zeros((n_tokens, 0), np.float32), no_columns)
            np.testing.assert_array_equal(y, np.zeros((n_tokens, 21), np.float32))
    zeros = np.zeros((2, 256), np.float32)
    assert not backend.linear(zeros, w).any()


@pytest.mark.skipif("avx512" not in LEVELS, reason="tiles are trapped where there is AVX-512")
@pytest.mark.parametrize("instruction", ["0f0b", "c4e27b49c0"], ids=["ud2", "a tile that is not set up"])
def test_what_is_no_good_tile_instruction_still_ends_the_process(instruction):
    program = f"from mpillama import _cpu; _cpu.trap_tiles(); import machine_code; machine_code.run({instruction!r})"
    environment = os.environ | {"PYTHONPATH": os.path.dirname(machine_code.__file__)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, env=environment)
    assert result.returncode in (-signal.SIGILL, -signal.SIGSEGV), result.stderr


@pytest.mark.skipif("amx" not in LEVELS, reason="there are no tiles")
@pytest.mark.parametrize("palette", [0, 1])
def test_tiles_stay_set_up_as_they_were(palette, rng):
    """Other libraries set them up once for each thread."""
    config = np.zeros(64, np.uint8)
    config[0] = palette
    if palette:
        config[16:32].view(np.uint16)[:] = 4 * rng.integers(1, 17, 8)
        config[48:56] = rng.integers(1, 17, 8)
    machine_code.run("c4e2784907", config.ctypes.data)  # LDTILECFG
    backend = CpuBackend(1, (), "amx")
    w, floats = make_weight(rng, backend, GGMLType.Q8_0, 1, 16, 64)
    x = rng.standard_normal((32, 64)).astype(np.float32)
    expect(backend.linear(x, w), x, floats[0], GGMLType.Q8_0, "amx", 32)
    after = np.full(64, 255, np.uint8)
    machine_code.run("c4e2794907", after.ctypes.data)  # STTILECFG
    machine_code.run("c4e2784907", np.zeros(64, np.uint8).ctypes.data)  # LDTILECFG
    np.testing.assert_array_equal(after, config)


@pytest.mark.skipif("amx" not in LEVELS, reason="there are no tiles")
def test_more_than_fits_the_caches(rng):
    """Several slices of the tokens, pieces of the columns and tasks, and the last of each smaller than the others."""
    type, n_in = GGMLType.Q8_0, 32 * int(rng.integers(33, 60))
    x = rng.standard_normal((257 + int(rng.integers(60)), n_in)).astype(np.float32)
    for n_threads in (1, 3):
        backend = CpuBackend(n_threads, (), "amx")
        pairs = [make_weight(rng, backend, type, 1, n_rows, n_in) for n_rows in (int(rng.integers(280, 330)), 17, 530)]
        for y, (_, floats) in zip(backend.linears(x, [w for w, _ in pairs]), pairs, strict=True):
            expect(y, x, floats[0], type, "amx", len(x))
        gate, up = (make_weight(rng, backend, type, 1, 150, n_in)[0] for _ in range(2))
        gated = backend.gated("silu", backend.linear(x, gate), backend.linear(x, up))
        np.testing.assert_array_equal(backend.gated_linear("silu", x, gate, up), gated)


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_memory_is_that_of_the_file(type, rng):
    raw = random_blocks(rng, type, (2, 64, 2048))
    w = CpuBackend(1).weight(RawWeight("w", type, raw, 2048))
    assert 0.999 * raw.nbytes <= w.nbytes <= 1.05 * raw.nbytes


def test_every_type_has_kernels():
    assert PACKED == SUPPORTED


def test_arrays_that_are_not_contiguous(rng):
    backend = CpuBackend(2)
    w, floats = make_weight(rng, backend, GGMLType.Q8_0, 1, 20, 64)
    x = np.asfortranarray(rng.standard_normal((6, 64)).astype(np.float32))
    for part in (x, x[::2], np.repeat(x, 2, axis=1)[:, ::2]):
        assert error(backend.linear(part, w), rounded(part) @ floats[0].T) < 2e-6


def test_wrong_shapes_are_refused(rng):
    backend = CpuBackend(1)
    w = backend.weight(RawWeight("w", GGMLType.Q8_0, random_blocks(rng, GGMLType.Q8_0, (2, 20, 64)), 64))
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(ValueError, match="wider"):
        backend.linear(np.zeros((2, 65), np.float32), w)
    with pytest.raises(ValueError, match="no such expert"):
        backend.expert_linear(x, w, np.array([[0], [2]]))
    with pytest.raises(ValueError, match="number of rows"):
        backend.expert_linear(x, w, np.zeros((3, 1), np.int64))
    with pytest.raises(ValueError, match="out has"):
        _cpu.linear(backend.pool, w.packed, x, 0, np.zeros((2, 21), np.float32))
    no_codebook = np.zeros(0, np.uint16)
    with pytest.raises(ValueError, match="whole blocks"):
        _cpu.PackedWeight(int(GGMLType.Q8_0), 1, 4, 33, no_codebook)
    with pytest.raises(ValueError, match="cannot be packed"):
        _cpu.PackedWeight(int(GGMLType.I32), 1, 4, 8, no_codebook)
    with pytest.raises(ValueError, match="codebook"):
        _cpu.PackedWeight(int(GGMLType.Q8_0), 1, 4, 32, np.zeros(5, np.uint16))
    packed = _cpu.PackedWeight(int(GGMLType.Q8_0), 2, 20, 32, no_codebook)
    with pytest.raises(ValueError, match="wrong size"):
        _cpu.pack(backend.pool, packed, 0, np.zeros((16, 33), np.uint8))
    for first, n in ((0, 15), (4, 16), (16, 22), (36, 16), (40, 1), (48, 0), (0, 41)):
        with pytest.raises(ValueError, match="whole panels"):
            _cpu.pack(backend.pool, packed, first, np.zeros((n, 34), np.uint8))


@pytest.mark.parametrize("level", LEVELS)
def test_fused_products_are_those_of_each_matrix(level, rng):
    """To the bit, whether the matrices can share the rounded activations or not, and whatever tokens are together."""
    backend = CpuBackend(3, (), level)
    types = [GGMLType.Q4_0, GGMLType.Q6_K, GGMLType.IQ2_S, GGMLType.F16, GGMLType.Q4_0]
    raws = [random_blocks(rng, type, (1, int(rng.integers(1, 90)), 512)) for type in types]
    pad = (int(rng.integers(0, 60)), 7)
    ws = [backend.weight(RawWeight("w", type, raw, 512, pad)) for type, raw in zip(types, raws, strict=True)]
    gate, up, other = (make_weight(rng, backend, type, 1, 77, 512, pad)[0] for type in (*types[:2], types[3]))
    for n_tokens in (0, 1, 5, 40):
        x = rng.standard_normal((n_tokens, 512 - sum(pad))).astype(np.float32)
        for y, w in zip(backend.linears(x, ws), ws, strict=True):
            np.testing.assert_array_equal(y, backend.linear(x, w))
        for activation in ("silu", "gelu", "swiglu_oai"):
            for second in (up, other):
                expected = backend.gated(activation, backend.linear(x, gate), backend.linear(x, second))
                np.testing.assert_allclose(
                    backend.gated_linear(activation, x, gate, second), expected, rtol=1e-5, atol=1e-6
                )
