"""Products, embeddings and experts of the GPU backend against float64, for every type, on the emulated device."""

import numpy as np
import pytest

from gpu_host import EVERY_VARIANT, VARIANTS, emulated, needs_compiler, variant_of
from mpillama.backends.gpu.matmul import FLOATS
from mpillama.backends.quants import SUPPORTED
from mpillama.gguf.types import GGMLType
from products import error, make_weight, product_error
from tiny import rounded_to_int8

pytestmark = needs_compiler
TYPES = sorted(SUPPORTED)


def some_width(rng, type):
    return int(rng.integers(1, 300)) if type in FLOATS else int(rng.integers(1, 6)) * type.block_size


def as_kernels_see(x, type, pad=(0, 0)):
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [pad])
    return padded.astype(np.float64) if type in FLOATS else rounded_to_int8(padded)


def check_type(rng, type, backend):
    pad = (0, 0) if rng.integers(2) else (int(rng.integers(1, 20)), int(rng.integers(0, 12)))
    n_rows, n_in = (
        int(rng.integers(1, 150)),
        some_width(rng, type) + (256 if type.block_size == 1 else 2 * type.block_size),
    )
    w, floats = make_weight(rng, backend, type, 1, n_rows, n_in, pad)
    for n_tokens in (int(rng.integers(1, 10)), int(rng.integers(9, 70))):
        x = rng.standard_normal((n_tokens, n_in - sum(pad))).astype(np.float32)
        y = backend.linear(x, w)
        assert y.shape == (n_tokens, n_rows)
        assert y.dtype == np.float32
        assert product_error(y, as_kernels_see(x, type, pad), floats[0]) < 2e-6
    return floats


@pytest.mark.parametrize("type", TYPES, ids=lambda t: t.name)
def test_every_type(type, rng):
    backend = emulated(*variant_of(type.name, rng), int(rng.integers(1 << 30)))
    check_type(rng, type, backend)

    n_rows, n_in, first = int(rng.integers(1, 60)), some_width(rng, type), int(rng.integers(0, 5))
    w, floats = make_weight(rng, backend, type, 1, n_rows, n_in)
    tokens = rng.integers(-3, n_rows + 10, 40).astype(np.int32)
    rows = backend.embedding(tokens, w, first)
    here = (tokens >= first) & (tokens < first + n_rows)
    expected = np.where(here[:, None], floats[0, np.where(here, tokens - first, 0)], 0)
    # A product and a sum may be one operation with one rounding, or two.
    np.testing.assert_allclose(rows, expected, rtol=1e-6, atol=np.abs(floats).max(initial=0) * 1e-6)

    w, floats = make_weight(rng, backend, type, 5, n_rows, n_in)
    for n_tokens in (int(rng.integers(1, 9)), int(rng.integers(9, 60))):
        chosen = np.array([rng.permutation(5)[:3] for _ in range(n_tokens)], np.int32)
        x = rng.standard_normal((n_tokens, n_in)).astype(np.float32)
        y = backend.expert_linear(x, w, chosen)
        exact = np.einsum("tkrn,tn->tkr", floats[chosen], as_kernels_see(x, type))
        assert error(y, exact) < 2e-6
        own = rng.standard_normal((n_tokens, 3, n_in)).astype(np.float32)
        exact = np.einsum("tkrn,tkn->tkr", floats[chosen], as_kernels_see(own, type))
        assert error(backend.expert_linear(own, w, chosen), exact) < 2e-6


@pytest.mark.parametrize("n_tokens", range(1, 10))
@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.Q4_K, GGMLType.Q8_0], ids=lambda t: t.name)
def test_every_number_of_tokens_warp_and_order(type, n_tokens, rng):
    for warp, order in EVERY_VARIANT:
        backend = emulated(warp, order, int(rng.integers(1 << 30)))
        n_rows, n_in = int(rng.integers(1, 90)), some_width(rng, type)
        w, floats = make_weight(rng, backend, type, 1, n_rows, n_in)
        x = rng.standard_normal((n_tokens, n_in)).astype(np.float32)
        assert product_error(backend.linear(x, w), as_kernels_see(x, type), floats[0]) < 2e-6


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.F16, GGMLType.BF16, GGMLType.Q6_K], ids=lambda t: t.name)
def test_float_products_of_many_tokens(type, rng, monkeypatch):
    monkeypatch.setattr("mpillama.backends.gpu.matmul.GEMM_ELEMENTS", 7000)
    backend = emulated(gemm_tokens=9)
    pad = (3, 5)
    w, floats = make_weight(rng, backend, type, 1, 77, 512, pad)
    x = rng.standard_normal((20, 504)).astype(np.float32) * (10.0 ** rng.uniform(-20, 20, (20, 1))).astype(np.float32)
    x[3] = 0
    device, sizes = backend.device, []
    empty = device.empty
    monkeypatch.setattr(device, "empty", lambda *args: sizes.append(args) or empty(*args))
    y = backend.linear(x, w)
    # Of the weights only some are floats at a time.
    halves = [np.prod(args[0]) for args in sizes if args[1:] == (np.uint16,)]
    assert max(halves, default=0) <= max(7000, 20 * 512)
    assert len(halves) == {GGMLType.F32: 0, GGMLType.F16: 1}.get(type, 1 + -(-77 // (7000 // 512)))
    exact = np.pad(x.astype(np.float64), ((0, 0), pad)) @ floats[0].T
    for row, expected in zip(y, exact, strict=True):
        assert error(row, expected) < (1e-6 if type == GGMLType.F32 else 6e-4)


def test_empty_shares(rng):
    backend = emulated()
    none, _ = make_weight(rng, backend, GGMLType.F32, 1, 0, 32)
    x = rng.standard_normal((3, 32)).astype(np.float32)
    assert backend.linear(x, none).shape == (3, 0)
    assert backend.expert_linear(x, none, np.zeros((3, 2), np.int32)).shape == (3, 2, 0)
    for type in (GGMLType.F32, GGMLType.Q4_0):
        w, _ = make_weight(rng, backend, type, 1, 7, 0)
        for n_tokens in (3, 12):
            np.testing.assert_array_equal(backend.linear(x[:1, :0].repeat(n_tokens, 0), w), np.zeros((n_tokens, 7)))


def test_all_tokens_to_one_expert_and_to_none(rng):
    backend = emulated(64, 2, int(rng.integers(1 << 30)))
    w, floats = make_weight(rng, backend, GGMLType.Q4_0, 40, 9, 64)
    x = rng.standard_normal((100, 64)).astype(np.float32)
    chosen = np.full((100, 1), int(rng.integers(40)), np.int32)
    y = backend.expert_linear(x, w, chosen)[:, 0]
    assert error(y, rounded_to_int8(x) @ floats[chosen[0, 0]].T) < 2e-6


@pytest.mark.parametrize("n_expert", [0, 1, 5])
def test_experts_that_are_on_other_ranks(n_expert, rng):
    backend = emulated(*VARIANTS[rng.integers(len(VARIANTS))], int(rng.integers(1 << 30)))
    for type in (GGMLType.F16, GGMLType.Q5_K):
        w, floats = make_weight(rng, backend, type, n_expert, 70, 256)
        for n_tokens in (int(rng.integers(1, 9)), int(rng.integers(9, 60))):
            x = rng.standard_normal((n_tokens, 256)).astype(np.float32)
            chosen = rng.integers(-1, n_expert, (n_tokens, 3)).astype(np.int32)
            y = backend.expert_linear(x, w, chosen)
            assert (y[chosen < 0] == 0).all()
            exact = np.einsum(
                "prn,pn->pr", floats[chosen[chosen >= 0]], as_kernels_see(x, type)[(chosen >= 0).nonzero()[0]]
            )
            assert error(y[chosen >= 0], exact) < 2e-6
