"""What the GPU backend does in one kernel against the ops that it stands for, and against NumPy in float64."""

import numpy as np
import pytest

from attention_pair import Pair
from gpu_host import EVERY_VARIANT, VARIANTS, HostView, emulated, gpu_backend, kernels_of, needs_compiler
from mpillama.backends.base import HeadNorms
from mpillama.config import Rope
from mpillama.gguf.types import GGMLType
from products import make_weight

pytestmark = needs_compiler


def exact_norm(x, w, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * w


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
@pytest.mark.parametrize("post", [False, True])
@pytest.mark.parametrize("n_used", [0, 3])
def test_residual_and_norm(warp, order, post, n_used, rng):
    """Rows that fit into one warp and into a block, whole sub-blocks and others; and those that fit nowhere."""
    backend = emulated(warp, order, int(rng.integers(1 << 30)))
    factor = float(rng.choice([1.0, 0.37]))
    for n in (4, *(4 * rng.integers(1, 600, 2)), 32 * int(rng.integers(2, 90)), int(rng.integers(2, 50)) * 2 + 1):
        n_tokens, eps = int(rng.integers(1, 5)), float(rng.choice([1e-6, 0.1]))
        h = rng.standard_normal((n_tokens, n)).astype("f4") * 3
        x = rng.standard_normal((n_tokens, n_used, n) if n_used else (n_tokens, n)).astype("f4")
        w, weight_after = rng.standard_normal((2, n)).astype("f4")
        weights = rng.random((n_tokens, n_used)).astype("f4") if n_used else None
        bias = index = None
        if rng.integers(2):
            bias = rng.standard_normal((6, n) if n_used else n).astype("f4")
            index = rng.integers(0, 6, (n_tokens, n_used)).astype("i4") if n_used else None
        after = weight_after if post else None
        total, y = backend.add_norm(h, x, w, eps, after, factor, weights, bias, index)
        if bias is not None:
            x = x + (bias if index is None else bias[index])
        branch = np.einsum("tkn,tk->tn", x.astype("f8"), weights) if n_used else x.astype("f8")
        branch = exact_norm(branch, weight_after, eps) if post else branch
        exact = h + factor * branch
        np.testing.assert_allclose(total, exact, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(y, exact_norm(exact, w, eps), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            backend.rms_norm(h, w, eps), exact_norm(h.astype("f8"), w, eps), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("n", [4096, 4100, 8192, 8224, 16384, 16388])
def test_long_rows(n, rng):
    """One, two and four fours to a thread, and too long a row."""
    backend = emulated(*VARIANTS[rng.integers(len(VARIANTS))], int(rng.integers(1 << 30)))
    h, x, w, post = rng.standard_normal((4, n)).astype("f4")
    total, y = backend.add_norm(h[None], x[None], w, 1e-5, post)
    exact = h + exact_norm(x.astype("f8"), post, 1e-5)
    np.testing.assert_allclose(total[0], exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(y[0], exact_norm(exact, w, 1e-5), rtol=1e-5, atol=1e-5)


def same_bits(a, b):
    np.testing.assert_array_equal(a.view("u4"), b.view("u4"))


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
def test_what_is_left_in_8_bits_is_what_a_product_would_make_of_it(warp, order, rng, monkeypatch):
    """Of norms, with and without a residual, and of activations; products of copies of these round for themselves."""
    backend = gpu_backend(warp, order, int(rng.integers(1 << 30)))
    put, get, host = backend.device.upload, backend.device.download, HostView(backend)
    seen = kernels_of(backend, monkeypatch)
    for n in (32, 32 * int(rng.integers(2, 20)), 32 * int(rng.integers(64, 140))):
        n_tokens, w = int(rng.integers(1, 12)), make_weight(rng, host, GGMLType.Q8_0, 1, 9, n)[0]
        h, x = rng.standard_normal((2, n_tokens, n)).astype("f4") * (
            10.0 ** rng.uniform(-9, 5, (2, n_tokens, 1))
        ).astype("f4")
        x[0] = 0
        gain = put(rng.standard_normal(n).astype("f4"))
        for op in range(3):
            if op == 0:
                y = backend.rms_norm(put(x), gain, 1e-12)
            elif op == 1:
                y = backend.add_norm(put(h), put(x), gain, 1e-12)[1]
            else:
                y = backend.gated("silu", put(h), put(x))
            # What another op leaves does not displace it, as a shared expert needs it after the others.
            backend.gated("gelu", put(x), put(x))
            seen.clear()
            found = get(backend.linear(y, w))
            assert len(seen) == 1
            same_bits(found, get(backend.linear(put(get(y)), w)))
            assert seen.count("quantize") == 1


def test_what_was_rounded_long_ago_is_rounded_again(rng, monkeypatch):
    """And what is cut in another way, or belongs to many tokens, or to a step before."""
    backend = gpu_backend(gemm_tokens=20)
    put, host, seen = backend.device.upload, HostView(backend), kernels_of(backend, monkeypatch)
    w = make_weight(rng, host, GGMLType.Q4_0, 1, 5, 64)[0]
    padded = make_weight(rng, host, GGMLType.Q4_0, 1, 5, 128, (32, 32))[0]

    def rounds(n_tokens, weight, between):
        y = backend.rms_norm(put(rng.standard_normal((n_tokens, 64)).astype("f4")), put(np.ones(64, "f4")), 1e-5)
        between()
        seen.clear()
        backend.linear(y, weight)
        return "quantize" in seen

    other = put(rng.standard_normal((2, 64)).astype("f4"))
    assert not rounds(3, w, lambda: None)
    assert rounds(3, padded, lambda: None)
    assert rounds(3, w, lambda: [backend.gated("silu", other, other) for _ in range(2)])
    assert rounds(3, w, backend.rounded.clear)
    assert not rounds(19, w, lambda: None)
    rounds(20, w, lambda: None)
    assert "add_norm_1" not in seen
    assert not backend.rounded.find(other, 64, 0)


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
def test_the_last_block_leaves_8_bits_too(warp, order, rng, monkeypatch):
    """Of gate and up, and of attention, whose splits it joins; counters are zeros again."""
    backend = gpu_backend(warp, order, int(rng.integers(1 << 30)))
    put, get, host = backend.device.upload, backend.device.download, HostView(backend)
    monkeypatch.setattr("mpillama.backends.gpu.attention._SPLIT_KEYS", 8)
    monkeypatch.setattr(backend.device, "n_cores", int(rng.integers(1, 30)), raising=False)
    seen = kernels_of(backend, monkeypatch)

    def same(y, n):
        w = make_weight(rng, host, GGMLType.Q8_0, 1, 9, n)[0]
        before = list(seen)
        found = get(backend.linear(y, w))
        assert before.count("quantize") + before.count("combine") == 0
        assert seen[len(before) :] == seen[-1:]
        same_bits(found, get(backend.linear(put(get(y)), w)))
        assert seen.count("quantize") == 1
        assert not get(backend.counters).any()
        seen.clear()

    for n_tokens in (1, *rng.integers(2, 9, 2)):
        n = 32 * int(rng.integers(1, 9))
        gate, up = (make_weight(rng, host, GGMLType.Q8_0, 1, n, 96)[0] for _ in range(2))
        x = put(rng.standard_normal((int(n_tokens), 96)).astype("f4"))
        # It is made for x alone.
        backend.linears(x, [gate, up])
        seen.clear()
        same(backend.gated_linear("silu", x, gate, up), n)

    for n_v in (32, 96, 160):
        sizes = (int(rng.integers(1, 4)) * 2, 2, 64, n_v)
        pair = Pair(rng, host, sizes, ("f16", "f16"), n_blocks=12, n_seqs=2, sinks=bool(rng.integers(2)))
        for lens in ((70, 3), (1, 1), (2, 0), (1, 5)):
            batch = pair.batch(lens)
            q, k, v = map(put, pair.inputs(len(batch.positions)))
            sinks = None if pair.sinks is None else put(pair.sinks)
            seen.clear()
            y = backend.attention(q, k, v, pair.cache, batch, pair.params, sinks)
            same(y.reshape(len(batch.positions), -1), sizes[0] * n_v)


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
@pytest.mark.parametrize("kv_type", ["f32", "f16", "q8_0"])
def test_norms_and_rotation_within_attention(warp, order, kv_type, rng):
    """Against the ops one by one: the results, and what the cache keeps."""
    backend, n_kv = emulated(warp, order, int(rng.integers(1 << 30))), int(rng.integers(1, 4))
    n_k, n_v = (int(n) for n in rng.choice([32, 64, 96, 160] if kv_type == "q8_0" else [6, 40, 64, 130], 2))
    sizes, types = (n_kv * int(rng.integers(1, 4)), n_kv, n_k, n_v), (kv_type, kv_type)
    ways = ((True, True, False), (True, False, True), (False, True, True), (False, False, True))
    for with_norms, with_rope, with_biases in ways:
        pair = Pair(rng, backend, sizes, types, n_blocks=4, n_seqs=2)
        plain = backend.new_cache(4, n_kv, n_k, n_v, *types)
        rope = Rope(2 * int(rng.integers(1, n_k // 2 + 1)), bool(rng.integers(2)), 1e4, attn_factor=1.2)
        gains = rng.standard_normal((2, n_k)).astype("f4")
        widths = sizes[0] * n_k, n_kv * n_k, n_kv * n_v
        biases = [rng.standard_normal(n).astype("f4") for n in widths] if with_biases else None
        for lens in ((33, 7), (1, 1), (0, 3)):
            batch = pair.batch(lens)
            q, k, v = (
                pair.random(len(batch.positions), heads, n) for heads, n in ((sizes[0], n_k), (n_kv, n_k), (n_kv, n_v))
            )
            table = backend.rope_table(batch.positions, rope, None) if with_rope else None
            device = backend.backend.device
            on_device = tuple(map(device.upload, biases)) if biases else (None, None, None)
            norms = HeadNorms(*map(device.upload, gains), 1e-5) if with_norms else None
            found = backend.attention(q, k, v, pair.cache, batch, pair.params, None, table, norms, on_device)
            if biases:
                q, k, v = (x + bias.reshape(x.shape[1:]) for x, bias in zip((q, k, v), biases, strict=True))
            if with_norms:
                q, k = backend.rms_norm(q, gains[0], 1e-5), backend.rms_norm(k, gains[1], 1e-5)
            if with_rope:
                q, k = backend.rope(q, table), backend.rope(k, table)
            expected = backend.attention(q, k, v, plain, batch, pair.params, None)
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
        used = pair.tables[pair.tables >= 0][:1]
        for a, b in zip(backend.read_blocks(pair.cache, used), backend.read_blocks(plain, used), strict=True):
            # A unit of 8 bits where the two round to either side.
            step = np.abs(b).max() / 127 if kv_type == "q8_0" else 1e-3 * np.abs(b).max()
            np.testing.assert_allclose(a, b, atol=1.01 * step, rtol=0)


def test_rows_that_are_added(rng):
    backend = emulated(*VARIANTS[rng.integers(len(VARIANTS))], int(rng.integers(1 << 30)))
    n = int(rng.integers(1, 300))
    x, table = rng.standard_normal((5, 3, n)).astype("f4"), rng.standard_normal((7, n)).astype("f4")
    index = rng.integers(0, 7, (5, 3)).astype("i4")
    same_bits(backend.add_taken(x, table, index), x + table[index])


@pytest.mark.parametrize("n", [64, 50])
def test_biases_of_experts(n, rng):
    backend = emulated(*VARIANTS[rng.integers(len(VARIANTS))], int(rng.integers(1 << 30)))
    gate, up = rng.standard_normal((2, 3, 2, n)).astype("f4")
    tables, index = rng.standard_normal((2, 5, n)).astype("f4"), rng.integers(0, 5, (3, 2)).astype("i4")
    upload = backend.backend.device.upload
    for activation in ("silu", "gelu", "swiglu_oai"):
        found = backend.gated(activation, gate, up, (*map(upload, tables), upload(index)))
        expected = backend.gated(activation, gate + tables[0][index], up + tables[1][index])
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_bias_of_a_router(rng):
    backend = emulated(*VARIANTS[rng.integers(len(VARIANTS))], int(rng.integers(1 << 30)))
    logits, bias = rng.standard_normal((4, 70)).astype("f4"), rng.standard_normal(70).astype("f4")
    for found, expected in zip(
        backend.route(logits, 6, "softmax_weight", True, bias),
        backend.route(logits + bias, 6, "softmax_weight", True),
        strict=True,
    ):
        same_bits(found, expected)


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
def test_equal_logits_and_nan(warp, order, rng):
    """Among equals the first, also those of other warps; what is no number leaves indices that are in range."""
    backend, n_expert = emulated(warp, order, int(rng.integers(1 << 30))), int(rng.choice([5, 64, 130, 1500]))
    n_used = int(rng.integers(1, min(n_expert, 40) + 1))
    logits = np.round(rng.standard_normal((3, n_expert)) * 2).astype("f4") / 2
    logits[1] *= 0.0
    index, weights = backend.route(logits, n_used, "softmax", True)
    np.testing.assert_array_equal(index, np.argsort(-logits, -1, kind="stable")[:, :n_used])
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
    logits[rng.random(logits.shape) < 0.5] = np.nan
    index, _ = backend.route(logits, n_used, "softmax_weight", False)
    for row, values in zip(index, logits, strict=True):
        assert len(set(row.tolist())) == n_used
        assert np.isnan(values[row]).sum() == min(n_used, np.isnan(values).sum())


def test_biases_and_norms_of_other_sizes_are_refused(rng):
    pair = Pair(rng, emulated(), (4, 2, 32, 64), ("f16", "f16"))
    batch = pair.batch([3])
    inputs, device = (*pair.inputs(3), pair.cache, batch, pair.params, None, None), pair.backend.backend.device
    right = {"bias": [128, 64, 128], "norm": [32, 32]}
    for kind, sizes in right.items():
        for wrong in range(len(sizes)):
            some = [device.empty((size + (i == wrong),)) for i, size in enumerate(sizes)]
            norms = HeadNorms(*some, 1e-5) if kind == "norm" else None
            with pytest.raises(ValueError, match="as wide as heads of 32 and 64"):
                pair.backend.attention(*inputs, norms, tuple(some) if kind == "bias" else (None, None, None))
