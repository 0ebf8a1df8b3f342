"""Products of up to 8 tokens: several matrices at once, gate and up, rows that begin anywhere."""

import numpy as np
import pytest

from gpu_host import EVERY_VARIANT, REAL, emulated, gpu_backend, kernels_of, needs_compiler, variant_of
from mpillama.backends.base import RawWeight
from mpillama.backends.gpu.matmul import FLOATS
from mpillama.backends.quants import SUPPORTED, dequantize
from mpillama.gguf.types import GGMLType
from products import error, make_weight, product_error
from tiny import random_blocks, rounded_to_int8

pytestmark = needs_compiler
TYPES = sorted(SUPPORTED)
# Rows of 2, 4, 8 and 16 bytes more than whole pieces of 16; of bytes; floats.
SOME_TYPES = [GGMLType[name] for name in ("Q8_0", "Q4_K", "Q6_K", "Q5_K", "MXFP4", "IQ4_XS", "F16", "F32")]
ACTIVATIONS = {
    "silu": lambda g, u: g / (1 + np.exp(-g)) * u,
    "gelu": lambda g, u: 0.5 * g * (1 + np.tanh(np.sqrt(2 / np.pi) * (g + 0.044715 * g**3))) * u,
    "swiglu_oai": lambda g, u: np.minimum(g, 7) / (1 + np.exp(-1.702 * np.minimum(g, 7))) * (np.clip(u, -7, 7) + 1),
}


def seen(x, type):
    """Return activations as the kernels take them."""
    return x.astype(np.float64) if type in FLOATS else rounded_to_int8(x)


def some_backend(rng, warp, order):
    return emulated(warp, order, int(rng.integers(1 << 30)))


@pytest.mark.parametrize("type", SOME_TYPES, ids=lambda t: t.name)
def test_rows_of_several_chunks_that_begin_anywhere(type, rng):
    """Odd numbers of blocks, more columns than the warps of a block take at once, and fewer rows than a group has."""
    for warp, order in EVERY_VARIANT:
        n_tokens = int(rng.choice([1, 2, 4, 8]))
        backend = some_backend(rng, warp, order)
        n_in = int(rng.integers(1, 70)) * (8 if type.block_size == 1 else 32)
        if rng.integers(2):
            n_in = int(rng.integers(8 * warp * 32 - 400, 9 * warp * 32 + 400))
        n_in = max(1, n_in // type.block_size) * type.block_size
        w, floats = make_weight(rng, backend, type, 1, int(rng.integers(1, 20)), n_in)
        x = rng.standard_normal((n_tokens, n_in)).astype("f4")
        assert product_error(backend.linear(x, w), seen(x, type), floats[0]) < 2e-6


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_gate_and_up_are_one_product(type, rng):
    warp, _ = variant_of(type.name, rng)
    for activation, formula in ACTIVATIONS.items():
        backend = some_backend(rng, warp, int(rng.integers(3)))
        n_in, n_tokens = int(rng.integers(1, 4)) * max(8, type.block_size), int(rng.integers(1, 12))
        (gate, g), (up, u) = (make_weight(rng, backend, type, 1, 1 + 7 * n_tokens, n_in) for _ in range(2))
        x = (rng.standard_normal((n_tokens, n_in)) * rng.uniform(0.01, 1)).astype("f4")
        exact = seen(x, type)
        y = backend.gated_linear(activation, x, gate, up)
        expected = formula(exact @ g[0].T, exact @ u[0].T)
        # Where gate and up are large, and nearly cancel, so are the errors of their sums.
        plain = backend.gated(activation, backend.linear(x, gate), backend.linear(x, up))
        assert error(y, plain.astype("f8")) < 1e-6
        assert error(y, expected) < 1e-4


@pytest.mark.skipif(bool(REAL), reason="counts launches of the emulated device")
@pytest.mark.parametrize("n_tokens", [1, 5, 8, 9])
def test_matrices_of_one_type_share_a_launch(n_tokens, rng, monkeypatch):
    """Five of one width, two types, one of them without rows: two launches, or one each from 9 tokens on."""
    backend = gpu_backend(*EVERY_VARIANT[rng.integers(len(EVERY_VARIANT))], seed=int(rng.integers(1 << 30)))
    device, launches = backend.device, kernels_of(backend, monkeypatch)
    types = [GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q4_K, GGMLType.Q4_K, GGMLType.Q6_K]
    weights, matrices = [], []
    for type, n_rows in zip(types, (70, 9, 0, 3, 41), strict=True):
        raw = random_blocks(rng, type, (1, n_rows, 512))
        weights.append(backend.weight(RawWeight("w", type, raw, 512)))
        matrices.append(dequantize(raw, type)[0].astype("f8"))
    x = rng.standard_normal((n_tokens, 512)).astype("f4")
    ys = backend.linears(device.upload(x), weights)
    for y, matrix in zip(ys, matrices, strict=True):
        assert y.shape == (n_tokens, len(matrix))
        assert product_error(device.download(y), rounded_to_int8(x), matrix) < 2e-6
    products = [name for name in launches if name.startswith("mat")]
    assert len(products) == (4 if n_tokens == 9 else 2)
    assert launches.count("quantize") == 1

    launches.clear()
    gate = backend.weight(RawWeight("w", GGMLType.Q4_K, random_blocks(rng, GGMLType.Q4_K, (1, 30, 512)), 512))
    backend.gated_linear("silu", device.upload(x), gate, gate)
    assert launches == (
        ["quantize", "matmul", "matmul", "gated"]
        if n_tokens == 9
        else ["quantize", f"matvec_{1 << (n_tokens - 1).bit_length()}"]
    )


def test_linears_of_different_widths_and_more_than_a_launch_takes(rng):
    backend = some_backend(rng, 32, 2)
    for type in (GGMLType.F16, GGMLType.Q8_0):
        x = rng.standard_normal((2, 64)).astype("f4")
        pairs = [make_weight(rng, backend, type, 1, int(rng.integers(1, 30)), 64) for _ in range(7)]
        # A slice of a rank, met with zeros.
        pairs.append(make_weight(rng, backend, type, 1, 11, 96, (10, 22)))
        ys = [
            backend.backend.device.download(y)
            for y in backend.backend.linears(backend.backend.device.upload(x), [w for w, _ in pairs])
        ]
        for y, (w, floats) in zip(ys, pairs, strict=True):
            wide = np.pad(x, ((0, 0), (w.pad, w.n_in - w.pad - 64)))
            assert product_error(y, seen(wide, type), floats[0]) < 2e-6


def test_gate_and_up_of_different_types(rng):
    backend = some_backend(rng, 64, 1)
    (gate, g), (up, u) = (make_weight(rng, backend, type, 1, 20, 256) for type in (GGMLType.Q4_K, GGMLType.Q6_K))
    x = (rng.standard_normal((3, 256)) * 0.1).astype("f4")
    exact = rounded_to_int8(x)
    expected = ACTIVATIONS["silu"](exact @ g[0].T, exact @ u[0].T)
    assert error(backend.gated_linear("silu", x, gate, up), expected) < 1e-4


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
def test_experts_whose_matrices_begin_anywhere(warp, order, rng):
    """630 bytes to a row, and an odd number of rows: each matrix begins 2 bytes further in its piece of 16."""
    backend = some_backend(rng, warp, order)
    w, floats = make_weight(rng, backend, GGMLType.Q6_K, 6, 13, 768)
    n_tokens = int(rng.integers(1, 9))
    chosen = rng.integers(-1, 6, (n_tokens, 2)).astype("i4")
    x = rng.standard_normal((n_tokens, 2, 768)).astype("f4")
    y = backend.expert_linear(x, w, chosen)
    assert (y[chosen < 0] == 0).all()
    exact = np.einsum("prn,pn->pr", floats[chosen[chosen >= 0]], rounded_to_int8(x)[chosen >= 0])
    assert error(y[chosen >= 0], exact) < 2e-6


def test_float_rows_that_are_no_whole_pieces(rng):
    backend = some_backend(rng, 32, 1)
    for type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16):
        for n_in in (1, 7, 9, 255, 256, 2056, 2051):
            w, floats = make_weight(rng, backend, type, 1, 5, n_in)
            x = rng.standard_normal((3, n_in)).astype("f4")
            assert product_error(backend.linear(x, w), x.astype("f8"), floats[0]) < 2e-6


@pytest.mark.skipif(bool(REAL), reason="about the emulated device")
@pytest.mark.parametrize("fault", ["wait", "meet", "early"])
def test_a_missing_wait_or_barrier_is_found(fault, rng, monkeypatch):
    """Bytes of asynchronous copies come as late as they may, and lanes run in several orders."""
    from mpillama.backends.gpu import source

    read = source.read
    changes = {
        "wait": ("wait_for_copies<ahead - 1>();", ""),
        "meet": ("      __syncwarp();\n", ""),
        "early": ("wait_for_copies<ahead - 1>", "wait_for_copies<ahead>"),
    }

    def broken(name):
        text = read(name)
        if name != "matvec.cuh":
            return text
        assert changes[fault][0] in text
        return text.replace(*changes[fault])

    monkeypatch.setattr(source, "read", broken)
    errors = []
    for order in (0, 1, 2):
        backend = some_backend(rng, 32, order)
        w, floats = make_weight(rng, backend, GGMLType.Q8_0, 1, 24, 2048)
        x = rng.standard_normal((1, 2048)).astype("f4")
        if fault == "meet":
            errors.append(error(backend.linear(x, w), rounded_to_int8(x) @ floats[0].T))
        else:
            with pytest.raises(RuntimeError, match="a thread ends before its copies"):
                backend.linear(x, w)
    # NaN is none either.
    assert fault != "meet" or not all(each < 1e-3 for each in errors)
