"""The small ops of the cpu backend against NumPy's, and its exponentials against float64."""

from __future__ import annotations

import numpy as np
import pytest

from mpillama.backends.reference import ReferenceBackend
from mpillama.config import Rope

_cpu = pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.backend import CpuBackend  # noqa: E402

REFERENCE = ReferenceBackend()
SIZES = (1, 7, 8, 15, 16, 17, 100, 4096, 20011)


@pytest.fixture(params=_cpu.levels())
def backend(request) -> CpuBackend:
    return CpuBackend(2, (), request.param)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def relative_error(result, exact):
    return np.max(np.abs(result - exact) / np.abs(exact))


def test_the_exponential(backend, rng):
    """Far below 0 the logistic function is the exponential."""
    x = np.concatenate([np.linspace(-87.3, 30, 200001), rng.uniform(-1, 1, 1000)]).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert relative_error(backend.sigmoid(x), exact) < 1e-6


def test_the_hyperbolic_tangent(backend, rng):
    x = rng.choice([-1, 1], 200000) * 10.0 ** rng.uniform(-30, 3, 200000)
    x = np.concatenate([x, np.linspace(0.5, 10, 100000), [0.625, np.nextafter(np.float32(0.625), 1)]]).astype(
        np.float32
    )
    assert relative_error(backend.softcap(x, 1.0), np.tanh(x.astype(np.float64))) < 1e-6
    assert backend.softcap(np.zeros(3, np.float32), 5.0).tolist() == [0, 0, 0]


def test_extremes(backend):
    x = np.array([-np.inf, -1e38, -200, 0, 200, 1e38, np.inf, np.nan], np.float32)
    sigmoid = backend.sigmoid(x)
    np.testing.assert_array_equal(sigmoid[[3, 4, 5, 6, 7]], np.array([0.5, 1, 1, 1, np.nan], np.float32))
    assert (sigmoid[:3] == 0).all()
    np.testing.assert_allclose(backend.softcap(x, 30.0), REFERENCE.softcap(x, 30.0), rtol=1e-6)
    ones = np.ones_like(x)
    for activation in ("silu", "gelu", "swiglu_oai"):
        result = backend.gated(activation, x, ones)
        assert np.isnan(result[7])
        assert (result[1:3] == 0).all()
        assert np.isnan(backend.gated(activation, ones, x)[7])


@pytest.mark.parametrize("activation", ["silu", "gelu", "swiglu_oai"])
def test_gated(backend, rng, activation):
    for n in SIZES:
        gate, up = normal(rng, 2, n) * np.float32(5), normal(rng, 2, n) * np.float32(5)
        result = backend.gated(activation, gate, up)
        np.testing.assert_allclose(result, REFERENCE.gated(activation, gate, up), rtol=1e-5, atol=2e-5)
        g, u = gate.astype(np.float64), up.astype(np.float64)
        if activation == "silu":
            exact = g / (1 + np.exp(-g)) * u
        elif activation == "gelu":
            # 1 + tanh(x) loses all its digits where the argument is far below 0.
            with np.errstate(over="ignore"):
                exact = g / (1 + np.exp(-2 * 0.7978845608028654 * g * (1 + 0.044715 * g * g))) * u
        else:
            g, u = np.minimum(g, 7), np.clip(u, -7, 7)
            exact = g / (1 + np.exp(-1.702 * g)) * (u + 1)
        np.testing.assert_allclose(result, exact, rtol=1e-5, atol=1e-6)
    assert backend.gated(activation, normal(rng, 3, 4, 5), normal(rng, 3, 4, 5)).shape == (3, 4, 5)


def test_softcap_and_sigmoid(backend, rng):
    for n in SIZES:
        x = normal(rng, 3, n) * np.float32(20)
        np.testing.assert_allclose(backend.softcap(x, 30.0), REFERENCE.softcap(x, 30.0), rtol=1e-5)
        np.testing.assert_allclose(backend.sigmoid(x), REFERENCE.sigmoid(x), rtol=1e-5, atol=1e-37)


def test_rms_norm(backend, rng):
    for shape in ((1, 1), (1, 2048), (3, 2880), (5, 7), (20, 100), (4, 3, 64), (2, 5, 33), (1, 20011)):
        x, w = normal(rng, *shape) * np.float32(3), normal(rng, 1, shape[-1])
        for eps in (1e-6, 1.0):
            result = backend.rms_norm(x, w, eps)
            np.testing.assert_allclose(result, REFERENCE.rms_norm(x, w, eps), rtol=1e-5, atol=1e-7)
            y = x.astype(np.float64)
            exact = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + eps) * w
            np.testing.assert_allclose(result, exact, rtol=2e-6)
    assert (backend.rms_norm(np.zeros((2, 50), np.float32), normal(rng, 1, 50), 1e-5) == 0).all()


@pytest.mark.parametrize("neox", [True, False])
def test_rope(backend, rng, neox):
    for n_rot, n_dim in ((64, 64), (2, 6), (10, 16), (40, 64), (34, 80), (128, 128), (6, 6), (24, 100)):
        rope = Rope(n_rot, neox, 10000.0, freq_scale=0.5, attn_factor=1.2)
        factors = rng.uniform(0.5, 8, n_rot // 2).astype(np.float32) if rng.integers(2) else None
        for n_tokens in (1, 70):
            positions = np.sort(rng.integers(0, 100000, n_tokens)).astype(np.int32)
            x = normal(rng, n_tokens, 5, n_dim)
            result = backend.rope(x, backend.rope_table(positions, rope, factors))
            expected = REFERENCE.rope(x, REFERENCE.rope_table(positions, rope, factors))
            np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_add_and_mul_are_numpys(backend, rng):
    shapes = [
        ((1, 2048), (1, 2048)),
        ((64, 500), (64, 500)),
        ((64, 500), (1, 500)),
        ((64, 500), (500,)),
        ((9, 3, 777), (777,)),
    ]
    shapes += [
        ((40, 4, 300), (4, 300)),
        ((40, 4, 300), (40, 4, 1)),
        ((300, 100), (300, 1)),
        ((300, 100), (1, 1)),
        ((1, 1, 900), (900,)),
    ]
    shapes += [((500,), (64, 500)), ((1, 500), (64, 500)), ((64, 1, 500), (3, 500)), ((1, 20000), (1, 1, 20000))]
    for a_shape, b_shape in shapes:
        a, b = normal(rng, *a_shape), normal(rng, *b_shape)
        for result, expected in ((backend.add(a, b), a + b), (backend.mul(a, b), a * b)):
            assert result.shape == expected.shape
            np.testing.assert_array_equal(result, expected)
    for n in (10, 40000):
        x = normal(rng, 2, n)
        np.testing.assert_array_equal(backend.mul(x, 0.1), x * np.float32(0.1))


def test_sum_experts(backend, rng):
    for n_tokens, n_used, n in ((1, 8, 2048), (70, 4, 333), (3, 1, 5)):
        x, weights = normal(rng, n_tokens, n_used, n), rng.random((n_tokens, n_used), np.float32)
        result = backend.sum_experts(x, weights)
        np.testing.assert_allclose(result, REFERENCE.sum_experts(x, weights), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gating", ["softmax", "softmax_weight"])
@pytest.mark.parametrize("normalize", [True, False])
def test_route(backend, rng, gating, normalize):
    for n_tokens, n_expert, n_used in ((1, 128, 8), (200, 32, 4), (5, 3, 3), (2, 8, 1)):
        logits = normal(rng, n_tokens, n_expert) * np.float32(4)
        for scores in (logits, np.round(logits), np.zeros_like(logits), logits * np.float32(100)):
            experts, weights = backend.route(scores, n_used, gating, normalize)
            expected, expected_weights = REFERENCE.route(scores, n_used, gating, normalize)
            np.testing.assert_array_equal(experts, expected)
            np.testing.assert_allclose(weights, expected_weights, rtol=1e-5, atol=1e-30)
            assert weights.dtype == np.float32


def test_routers_of_broken_numbers_choose_valid_experts(backend):
    experts, weights = backend.route(np.full((3, 16), np.nan, np.float32), 4, "softmax", True)
    assert (experts == np.arange(4)).all()
    assert np.isnan(weights).all()


def test_arrays_that_are_not_contiguous(backend, rng):
    x, up, w = normal(rng, 6, 128)[::2, ::2], normal(rng, 64, 3).T, normal(rng, 1, 128)[:, 1::2]
    np.testing.assert_allclose(backend.rms_norm(x, w, 1e-5), REFERENCE.rms_norm(x, w, 1e-5), rtol=1e-5)
    np.testing.assert_allclose(backend.gated("silu", x, up), REFERENCE.gated("silu", x, up), rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_nothing(rng):
    x, w = normal(rng, 37, 3001), normal(rng, 1, 3001)

    def results(n_threads):
        backend = CpuBackend(n_threads)
        return [backend.rms_norm(x, w, 1e-5), backend.gated("silu", x, x), backend.softcap(x, 2.0), backend.add(x, w)]

    for n_threads in (2, 3):
        for a, b in zip(results(1), results(n_threads), strict=True):
            np.testing.assert_array_equal(a, b)
