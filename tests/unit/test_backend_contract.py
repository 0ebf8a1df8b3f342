"""Every backend against formulas written out slowly, in float64, one number at a time."""

import functools
import math
from itertools import pairwise

import gguf
import numpy as np
import pytest

from attention_pair import coarseness, kept
from gpu_host import REAL, VARIANTS, emulated, needs_compiler
from mpillama.backends import make_backend
from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch, RawWeight
from mpillama.backends.kv_codec import decode, encode
from mpillama.backends.quants import dequantize
from mpillama.backends.reference import ReferenceBackend
from mpillama.backends.rope import frequencies
from mpillama.config import Rope
from mpillama.errors import UsageError
from mpillama.gguf.types import GGMLType
from tiny import random_blocks


def backends():
    """Return the reference, the emulated GPU, and the cpu backend at every level there is, with 1 and 3 threads."""
    found = [pytest.param(ReferenceBackend, id="reference")]
    for warp, order in VARIANTS[:2]:
        make = functools.partial(emulated, warp, order)
        found.append(pytest.param(make, id=f"{REAL or 'emulated'}-{warp}-{order}", marks=needs_compiler))
    try:
        from mpillama import _cpu
    except ImportError:
        return found
    for level in _cpu.levels():
        for threads in (1, 3):
            make = functools.partial(make_backend, "cpu", threads, (), level)
            found.append(pytest.param(make, id=f"cpu-{level}-{threads}"))
    return found


@pytest.fixture(params=backends())
def backend(request):
    """One backend of this machine."""
    return request.param()


def batch_of(lengths, pasts, n_blocks, rng):
    """Return a batch of sequences that have ``pasts`` tokens behind them, each with KV blocks of its own."""
    order = rng.permutation(n_blocks)
    tables, taken = np.full((len(lengths), n_blocks), -1, np.int32), 0
    for row, (length, past) in enumerate(zip(lengths, pasts, strict=True)):
        n = -(-(length + past) // KV_BLOCK)
        tables[row, :n] = order[taken : taken + n]
        taken += n
    positions = np.concatenate([np.arange(p, p + n) for n, p in zip(lengths, pasts, strict=True)]).astype(np.int32)
    none = np.zeros(0, np.int32)
    return Batch(np.zeros(len(positions), np.int32), positions, np.array(lengths, np.int32), tables, none)


_QUANTS = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}


def test_quantized_cache_rounds_like_the_file_format(backend, rng):
    """A token that sees only itself gets the value that the cache has kept, to one unit of the last place."""
    x = (rng.standard_normal((300, 1, 64)) * 10.0 ** rng.uniform(-3, 2, (300, 1, 1))).astype("f4")
    x[0] = 0
    for kv_type, unit in (("q8_0", 127), ("q4_0", 8)):
        cache = backend.new_cache(12, 1, 64, 64, "f32", kv_type)
        out = backend.attention(x, x, x, cache, batch_of([300], [0], 12, rng), AttentionParams(1.0, 0.0, 1, (0,)), None)
        step = np.abs(x).reshape(300, 2, 32).max(axis=-1).repeat(32, axis=-1)[:, None] / unit
        wrong = np.abs(out - kept(x, kv_type)) > 1e-6 * step * unit
        assert wrong.mean() < 0.002
        assert (np.abs(out - x) <= step * 1.01).all()


def test_cache_types_and_sizes_of_heads(backend):
    with pytest.raises(UsageError, match="values of 80 elements cannot be cached as q8_0; choose one of f32, f16"):
        backend.new_cache(1, 1, 64, 80, "q4_0", "q8_0")
    with pytest.raises(UsageError, match="keys cannot be cached as q5_1; choose one of f32, f16, bf16, q8_0, q4_0"):
        backend.new_cache(1, 1, 64, 64, "q5_1", "f16")


def slow_attention(q, keys, values, position, params, sinks):
    """Attend from one token: q (H, D), all keys (C, G, D) and values (C, G, Dv) up to its position."""
    out = np.zeros((len(q), values.shape[2]))
    for head, group in enumerate(params.kv_heads):
        scores = {}
        for other in range(position + 1):
            if params.window and position - other >= params.window:
                continue
            score = float(q[head].astype(float) @ keys[other, group].astype(float)) * params.scale
            scores[other] = params.softcap * math.tanh(score / params.softcap) if params.softcap else score
        total = sum(math.exp(s) for s in scores.values()) + (math.exp(sinks[head]) if sinks is not None else 0.0)
        for other, score in scores.items():
            out[head] += math.exp(score) / total * values[other, group]
    return out


@pytest.mark.parametrize("window", [0, 1, 5, 40])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (20.0, False), (0.0, True)])
@pytest.mark.parametrize("kv_heads", [(0, 0, 1, 1), (0, 1), (0, 1, 1, 1, 2), ()])
@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_attention(window, softcap, with_sinks, kv_heads, kv_type, backend, rng):
    check_attention(window, softcap, with_sinks, kv_heads, kv_type, backend, rng)


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("kv_type", ["q8_0", "q4_0"])
def test_attention_over_a_quantized_cache(window, kv_type, backend, rng):
    check_attention(window, 0.0, True, (0, 1, 1, 1, 2), kv_type, backend, rng)


def check_attention(window, softcap, with_sinks, kv_heads, kv_type, backend, rng):
    """Run steps of two sequences and compare each token with the slow formula."""
    n_head, n_kv = len(kv_heads), max(kv_heads, default=-1) + 1
    n_k, n_v = rng.choice([32, 64] if kv_type in _QUANTS else [6, 8, 16, 40], 2).tolist()
    params = AttentionParams(n_k**-0.5, softcap, window, kv_heads)
    sinks = rng.standard_normal(n_head).astype("f4") if with_sinks else None
    cache, coarser = backend.new_cache(12, n_kv, n_k, n_v, kv_type, kv_type), coarseness(backend, kv_type)
    history = [(np.zeros((0, n_kv, n_k)), np.zeros((0, n_kv, n_v))) for _ in range(2)]
    pasts, table_rng = [0, 0], np.random.default_rng(3)
    tables = batch_of([100, 90], [0, 0], 12, table_rng).block_tables
    for lengths in ([37, 5], [1, 1], [4, 30], [1, 2]):
        n = sum(lengths)
        q, k, v = (rng.standard_normal((n, h, d)).astype("f4") for h, d in ((n_head, n_k), (n_kv, n_k), (n_kv, n_v)))
        # What was rounded before is rounded the same way by every order of operations.
        k, v = kept(k, kv_type), kept(v, kv_type)
        positions = np.concatenate([np.arange(p, p + m) for p, m in zip(pasts, lengths, strict=True)]).astype("i4")
        batch = Batch(positions, positions, np.array(lengths, "i4"), tables, positions[:0])
        out = backend.attention(q, k, v, cache, batch, params, sinks)
        assert out.shape == (n, n_head, n_v)
        start = 0
        for row, length in enumerate(lengths):
            part = slice(start, start + length)
            old_k, old_v = history[row]
            history[row] = np.concatenate([old_k, k[part]]), np.concatenate([old_v, v[part]])
            for t in range(start, start + length):
                expected = slow_attention(q[t], *history[row], int(positions[t]), params, sinks)
                np.testing.assert_allclose(out[t], expected, rtol=2e-5 * coarser, atol=2e-6 * coarser)
            start += length
            pasts[row] += length


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("n_kv", [2, 0])
def test_copied_blocks_are_the_same_for_attention(n_kv, kv_type, backend, rng):
    """Two sequences that share a full block and a partial one go on in copies of the partial one, and do not meet."""
    params = AttentionParams(0.3, 0.0, 0, tuple(range(n_kv)))
    cache = backend.new_cache(8, n_kv, 16, 24, kv_type, kv_type)

    def attend(positions, tables, q, k, v):
        lens = np.full(len(tables), len(positions) // len(tables), "i4")
        batch = Batch(positions, positions, lens, np.array(tables, "i4"), positions[:0])
        return backend.attention(q, k, v, cache, batch, params, None)

    def draw(n):
        return [rng.standard_normal((n, n_kv, d)).astype("f4") for d in (16, 16, 24)]

    n = KV_BLOCK + 9
    prompt = draw(n)
    attend(np.arange(n, dtype="i4"), [[5, 2]], *prompt)
    backend.copy_blocks(cache, np.array([[2, 7], [2, 0], [5, 3]], "i4"))
    later = [draw(3) for _ in range(4)]
    tables = [[5, 7], [5, 0], [3, 2], [5, 7]]
    positions = np.arange(n, n + 3, dtype="i4")
    outs = [attend(positions, [table], *step) for table, step in zip(tables[:3], later, strict=False)]
    # What the others wrote must not be seen by another run of the first.
    outs.append(attend(positions, [tables[3]], *later[0]))
    np.testing.assert_array_equal(outs[3], outs[0])
    for out, step in zip(outs, later[:3], strict=False):
        fresh = backend.new_cache(2, n_kv, 16, 24, kv_type, kv_type)
        q, k, v = (np.concatenate(pair) for pair in zip(prompt, step, strict=True))
        every = np.arange(n + 3, dtype="i4")
        batch = Batch(every, every, np.array([n + 3], "i4"), np.array([[0, 1]], "i4"), every[:0])
        whole = backend.attention(q, k, v, fresh, batch, params, None)
        coarser = coarseness(backend, kv_type)
        np.testing.assert_allclose(out, whole[n:], rtol=1e-5 * coarser, atol=1e-6 * coarser)


@pytest.mark.parametrize("neox", [False, True])
def test_rope_turns_pairs_by_position_times_frequency(neox, backend, rng):
    rope = Rope(n_rot=12, neox=neox, freq_base=1000.0, freq_scale=0.5, attn_factor=1.25)
    positions = np.array([0, 1, 7, 5000], np.int32)
    x = rng.standard_normal((4, 3, 16)).astype("f4")
    out = backend.rope(x, backend.rope_table(positions, rope, None))
    for t, position in enumerate(positions.tolist()):
        for pair in range(6):
            i, j = (pair, pair + 6) if neox else (2 * pair, 2 * pair + 1)
            turned = (x[t, :, i] + 1j * x[t, :, j]) * 1.25 * np.exp(1j * position * 0.5 * 1000.0 ** (-2 * pair / 12))
            np.testing.assert_allclose(out[t, :, i], turned.real, atol=1e-5)
            np.testing.assert_allclose(out[t, :, j], turned.imag, atol=1e-5)
    np.testing.assert_array_equal(out[..., 12:], x[..., 12:])


def test_rope_factors_divide_the_frequencies(rng):
    factors = rng.uniform(0.5, 8, 4).astype("f4")
    plain = Rope(n_rot=8, neox=True, freq_base=10000.0)
    np.testing.assert_allclose(frequencies(plain, factors), frequencies(plain, None) / factors, rtol=1e-7)


def test_yarn_keeps_fast_pairs_slows_slow_ones_and_mixes_between():
    """The definition of the paper, section 3.2, by the number of turns r of each pair within the original context."""
    n_rot, base, factor, n_orig = 64, 10000.0, 4.0, 4096
    rope = Rope(n_rot, True, base, freq_scale=1 / factor, ext_factor=1.0, n_ctx_orig=n_orig)
    found = frequencies(rope, None)
    plain = base ** (-2.0 * np.arange(n_rot // 2) / n_rot)
    turns = n_orig * plain / (2 * math.pi)
    # Between the two the ramp runs over pair numbers, with its ends rounded outwards to whole pairs.
    assert found[turns > 33 * base ** (2 / n_rot)] == pytest.approx(plain[turns > 33 * base ** (2 / n_rot)])
    slow = turns < 1 / base ** (2 / n_rot)
    assert slow.any()
    assert found[slow] == pytest.approx(plain[slow] / factor)
    share = (found - plain / factor) / (plain - plain / factor)
    assert (np.diff(share) <= 1e-12).all()
    between = share[(share > 0) & (share < 1)]
    assert len(between) > 5
    assert np.diff(between) == pytest.approx(np.diff(between)[0])


@pytest.mark.parametrize("type", [GGMLType.F32, GGMLType.Q8_0, GGMLType.Q4_K])
@pytest.mark.parametrize("expand", [True, False])
def test_linear_embedding_and_experts(type, expand, rng, monkeypatch):
    if not expand:
        monkeypatch.setattr("mpillama.backends.reference.EXPAND_BYTES", 0)
        monkeypatch.setattr("mpillama.backends.reference._CHUNK_ELEMENTS", 3000)
    backend = ReferenceBackend()
    raw = random_blocks(rng, type, (5, 40, 512))
    exact = dequantize(raw, type).astype(float)
    x = rng.standard_normal((7, 500)).astype("f4")
    padded = np.concatenate([np.zeros((7, 8)), x, np.zeros((7, 4))], axis=1)
    one = backend.weight(RawWeight("w", type, raw[:1], 512, (8, 4)))
    np.testing.assert_allclose(backend.linear(x, one), padded @ exact[0].T, rtol=1e-3, atol=1e-5)

    tokens = np.array([3, 99, 41, 0, 39], np.int32)
    plain = backend.weight(RawWeight("w", type, raw[:1], 512))
    rows = backend.embedding(tokens, plain, first=2)
    for row, token in zip(rows, tokens, strict=True):
        np.testing.assert_array_equal(row, exact[0, token - 2].astype("f4") if 2 <= token < 42 else np.zeros(512))

    stack = backend.weight(RawWeight("w", type, raw, 512, (8, 4)))
    chosen = np.array([rng.permutation(5)[:2] for _ in range(7)])
    out = backend.expert_linear(x, stack, chosen)
    for t in range(7):
        for slot, expert in enumerate(chosen[t]):
            np.testing.assert_allclose(out[t, slot], exact[expert] @ padded[t], rtol=1e-3, atol=1e-5)
    own = backend.expert_linear(np.repeat(x[:, None], 2, axis=1), stack, chosen)
    np.testing.assert_allclose(own, out, rtol=1e-5, atol=1e-6)


def test_norms_and_activations(backend, rng):
    x, w = rng.standard_normal((3, 40)).astype("f4") * 4, rng.standard_normal(40).astype("f4")
    expected = x / np.sqrt((x.astype(float) ** 2).mean(axis=1, keepdims=True) + 1e-3) * w
    np.testing.assert_allclose(backend.rms_norm(x, w, 1e-3), expected, rtol=1e-5)
    mean = (backend.sum_squares(x, 0, 15) + backend.sum_squares(x, 15, 40)) / 40
    np.testing.assert_allclose(backend.scale_by_mean_square(x, mean, w, 1e-3), expected, rtol=1e-5)

    gate, up = x[:, :20].astype(float), x[:, 20:].astype(float)
    gate[0, :2] = (-200, 200)
    results = {
        "silu": gate / (1 + np.exp(-gate)) * up,
        "gelu": gate * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up,
        "swiglu_oai": np.minimum(gate, 7) / (1 + np.exp(-1.702 * np.minimum(gate, 7))) * (np.clip(up, -7, 7) + 1),
    }
    for name, expected in results.items():
        found = backend.gated(name, gate.astype("f4"), up.astype("f4"))
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6, err_msg=name)
    np.testing.assert_allclose(backend.softcap(x, 3.0), 3 * np.tanh(x / 3.0), rtol=1e-5)

    positions = np.concatenate([[0, 8191, 8192], rng.integers(0, 1 << 20, 5)]).astype("i4")
    expected = [[math.log(position // 8192 + 1) * 0.1 + 1] for position in positions.tolist()]
    np.testing.assert_allclose(backend.attn_temperature(positions, 8192.0, 0.1), expected, rtol=1e-6)


@pytest.mark.parametrize("gating", ["softmax", "softmax_weight"])
@pytest.mark.parametrize("normalize", [False, True])
def test_routing(gating, normalize, backend, rng):
    logits = rng.standard_normal((9, 6)).astype("f4") * 3
    logits[0] = 1.0
    experts, weights = backend.route(logits, 3, gating, normalize)
    assert experts[0].tolist() == [0, 1, 2]
    for t in range(9):
        order = sorted(range(6), key=lambda e: (-logits[t, e], e))[:3]
        assert experts[t].tolist() == order
        over = order if gating == "softmax_weight" else range(6)
        total = sum(math.exp(logits[t, e]) for e in over)
        expected = np.array([math.exp(logits[t, e]) / total for e in order])
        np.testing.assert_allclose(weights[t], expected / expected.sum() if normalize else expected, rtol=1e-5)


def test_experts_of_a_rank(backend, rng):
    """Which of them were chosen, by number and as what travels; biases of those alone."""
    to_host, n_tokens, n_used = backend.to_host, int(rng.integers(1, 9)), int(rng.integers(1, 5))
    index, _ = backend.route(backend.asarray(rng.standard_normal((n_tokens, 12))), n_used, "softmax", True)
    chosen, (start, stop) = to_host(index).astype(int), sorted(rng.integers(0, 13, 2))
    inside = (chosen >= start) & (chosen < stop)
    held = backend.held(index, int(start), int(stop))
    np.testing.assert_array_equal(to_host(held), np.where(inside, chosen - start, -1))
    again = backend.as_index(backend.as_numbers(index))
    assert to_host(backend.as_numbers(index)).dtype == np.float32
    np.testing.assert_array_equal(to_host(again), chosen)
    x, table = rng.standard_normal((n_tokens, n_used, 33)), rng.standard_normal((max(1, stop - start), 33))
    expected = np.where(inside[..., None], x + table[np.where(inside, chosen - start, 0)], x)
    result = backend.add_taken(backend.asarray(x), backend.asarray(table), held)
    np.testing.assert_allclose(to_host(result), expected, atol=1e-5)


def test_largest_of_each_row(backend, rng):
    """Also from several parts, as ranks have them; among equals the first, and nothing of -inf."""
    n_rows, k = int(rng.integers(1, 4)), int(rng.integers(1, 40))
    for n in (0, 1, int(rng.integers(2, 300)), int(rng.integers(2049, 7000))):
        x = rng.standard_normal((n_rows, n)).astype("f4")
        if rng.random() < 0.5:
            x = np.round(4 * x) / 4
        x[rng.random(x.shape) < rng.random() ** 8] = -np.inf
        x[rng.random(x.shape) < 0.0005] = np.inf
        x = x * rng.choice([-1.0, 1.0], x.shape).astype("f4") if rng.random() < 0.2 else x
        edges = [0, *sorted(rng.integers(0, n + 1, 2).tolist()), n]
        parts = [backend.top_k(backend.asarray(np.ascontiguousarray(x[:, a:b])), k, 5 + a) for a, b in pairwise(edges)]
        joined = backend.asarray(np.concatenate([backend.to_host(part) for part in parts], axis=1))
        for found in (backend.top_k(backend.asarray(x), k, 5), backend.merge_top_k(joined, k)):
            assert found.shape == (n_rows, 2 * k)
            for row, values in zip(backend.to_host(found), x, strict=True):
                columns = [int(i) for i in np.argsort(-values, kind="stable") if values[i] > -np.inf][:k]
                rest = k - len(columns)
                assert row[k:].tolist() == [5 + i for i in columns] + [-1] * rest
                assert row[:k].tolist() == values[columns].tolist() + [-np.inf] * rest
    assert backend.top_k(backend.asarray(np.zeros((0, 9), "f4")), k, 0).shape == (0, 2 * k)
    wrong = rng.standard_normal((1, 3000)).astype("f4")
    wrong[0, 2500] = np.nan
    found = backend.to_host(backend.top_k(backend.asarray(wrong), k, 0))[0]
    assert (np.isnan(found[0]), found[k]) == (True, 2500)


@pytest.mark.parametrize("kv_type", ["f32", "f16", "bf16", "q8_0", "q4_0"])
def test_blocks_are_read_as_they_were_kept_and_written_back_exactly(backend, kv_type, rng):
    n_tokens, n_heads, n_k, n_v = 5 * KV_BLOCK, 3, 64, 32
    cache = backend.new_cache(8, n_heads, n_k, n_v, kv_type, kv_type)
    k, v = (rng.standard_normal((n_tokens, n_heads, n)).astype(np.float32) for n in (n_k, n_v))
    k[7], v[9] = 0, 0
    k *= np.exp(rng.uniform(-9, 9, (n_tokens, n_heads, 1))).astype(np.float32)
    batch = batch_of([n_tokens], [0], 8, rng)
    q = rng.standard_normal((n_tokens, n_heads, n_k)).astype(np.float32)
    params = AttentionParams(0.1, 0.0, 0, (0, 1, 2))
    backend.attention(q, k, v, cache, batch, params, None)
    blocks = batch.block_tables[0, :5]
    found = backend.read_blocks(cache, blocks)
    for x, read in zip((k, v), found, strict=True):
        assert read.shape == (5, KV_BLOCK, *x.shape[1:])
        assert read.dtype == np.float32
        rows = read.reshape(-1, *x.shape[1:])[:n_tokens]
        if kv_type == "bf16":
            np.testing.assert_allclose(rows, x, rtol=2**-8)
        elif kv_type in _QUANTS:
            # Halves may be rounded either way.
            groups = np.abs(x).reshape(*x.shape[:-1], -1, 32).max(-1)
            step = np.repeat(groups / (127 if kv_type == "q8_0" else 8), 32, axis=-1)
            wrong = np.abs(rows - kept(x, kv_type))
            assert (wrong <= 1.01 * step).all()
            assert (wrong > 0.01 * step).mean() < 1e-3
        else:
            np.testing.assert_array_equal(rows, x.astype(np.float16 if kv_type == "f16" else np.float32))
    other = backend.new_cache(9, n_heads, n_k, n_v, kv_type, kv_type)
    backend.write_blocks(other, np.array([8, 1, 6, 0, 3]), *found)
    for read, again in zip(found, backend.read_blocks(other, np.array([8, 1, 6, 0, 3])), strict=True):
        np.testing.assert_array_equal(read, again)
    for x, type_ in zip(found, (kv_type, kv_type), strict=True):
        np.testing.assert_array_equal(decode(encode(x, type_), type_), x)
