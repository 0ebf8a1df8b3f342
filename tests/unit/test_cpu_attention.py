"""Attention of the cpu backend against NumPy's, on what the cache has kept of keys and values."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from attention_pair import Pair, kept
from mpillama.backends.attention import attend
from mpillama.backends.base import KV_BLOCK, AttentionParams, Batch
from mpillama.backends.kv_codec import CACHE_TYPES, row_bytes
from mpillama.config import Rope

_cpu = pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.backend import CpuBackend  # noqa: E402

# Where there is no AMX, the same machine code is still run, an instruction at a time.
_cpu.trap_tiles()
LEVELS = _cpu.levels()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("type_k", "type_v"), list(itertools.product(CACHE_TYPES, CACHE_TYPES)))
def test_types(rng, level, type_k, type_v):
    pair = Pair(rng, CpuBackend(2, (), level), (4, 2, 64, 96), (type_k, type_v), n_seqs=2)
    for lens in ((70, 5), (1, 1), (0, 1), (30, 130), (1, 1)):
        pair.step(*lens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", CACHE_TYPES)
def test_rounding(rng, level, type):
    """A token that sees itself only gets the value that the cache has kept."""
    backend = CpuBackend(1, (), level)
    pair = Pair(rng, backend, (1, 1, 32, 96), ("f32", type), window=1)
    batch = pair.batch([700])
    q, k, _ = pair.inputs(700)
    v = pair.random(700, 1, 96) * (10.0 ** rng.uniform(-9, 3, (700, 1, 1))).astype(np.float32)
    v[0] = 0
    result = backend.attention(q, k, v, pair.cache, batch, pair.params, None)
    wrong = result != kept(v, type)
    if level == "amx" and type in ("q8_0", "q4_0"):
        # A code times its factor has more bits than the sum of two numbers of bf16.
        wrong = np.abs(result - kept(v, type)) > np.abs(v).max(axis=-1, keepdims=True) * 2.0**-17
    if type in ("q8_0", "q4_0"):
        # Products are fused with sums on some levels, and then a value in the middle goes to its other neighbour.
        assert wrong.mean() < 1e-3
        steps = np.abs(v).reshape(700, 1, 3, 32).max(axis=-1).repeat(32, axis=-1) / (127 if type == "q8_0" else 8)
        assert (np.abs(result - v) <= 1.01 * steps + 1e-7)[wrong].all()
    else:
        assert not wrong.any()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "size", [(6, 6), (1, 1), (10, 3), (16, 16), (24, 40), (80, 80), (128, 64), (192, 128), (256, 256)]
)
def test_sizes_of_heads(rng, level, type, size):
    pair = Pair(rng, CpuBackend(1, (), level), (6, 2, *size), (type, type))
    for n_tokens in (33, 1, 1, 7, 40, 1):
        pair.step(n_tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", CACHE_TYPES)
def test_windows_softcap_and_sinks(rng, level, type):
    backend = CpuBackend(2, (), level)
    for window, softcap, sinks in (
        (5, 0.0, False),
        (1, 0.0, True),
        (100, 3.0, False),
        (0, 20.0, True),
        (32, 0.5, True),
    ):
        options = {"window": window, "softcap": softcap, "sinks": sinks, "n_seqs": 2, "n_blocks": 28}
        pair = Pair(rng, backend, (4, 2, 64, 32), (type, type), **options)
        for lens in ((1, 40), (150, 1), (1, 1), (1, 300), (1, 1)):
            pair.step(*lens)


@pytest.mark.parametrize("level", LEVELS)
def test_any_map_of_heads(rng, level):
    backend = CpuBackend(2, (), level)
    maps = [
        (0, 0, 0, 1),
        (0, 2, 2),
        (1, 1, 0, 2, 0),
        (2,),
        tuple(range(3)) * 10,
        (0,) * 70,
        tuple(rng.integers(0, 3, 9).tolist()),
    ]
    for heads in maps:
        pair = Pair(rng, backend, (len(heads), 3, 32, 32), ("f16", "q8_0"), kv_heads=heads)
        for n_tokens in (50, 1, 90, 2):
            pair.step(n_tokens)


def test_a_rank_without_query_heads_keeps_its_keys(rng):
    backend = CpuBackend(2)
    pair = Pair(rng, backend, (4, 2, 32, 32), ("f16", "f16"))
    batch = pair.batch([40])
    q, k, v = pair.inputs(40)
    nobody = AttentionParams(1.0, 0.0, 0, ())
    assert backend.attention(q[:, :0], k, v, pair.cache, batch, nobody, None).shape == (40, 0, 32)
    attend(q, k, v, pair.reference, batch, pair.params, None)
    pair.step(1)
    none = backend.new_cache(24, 0, 32, 32, "f16", "f16")
    assert backend.attention(q[:, :0], k[:, :0], v[:, :0], none, batch, nobody, None).shape == (40, 0, 32)


@pytest.mark.parametrize("level", LEVELS)
def test_random_steps_of_many_sequences(rng, level):
    n_seqs, longest = 9, 8 * KV_BLOCK
    types = tuple(rng.choice(list(CACHE_TYPES), 2).tolist())
    options = {
        "n_seqs": n_seqs,
        "n_blocks": n_seqs * 8,
        "window": int(rng.choice([0, 50])),
        "sinks": bool(rng.integers(2)),
    }
    pair = Pair(rng, CpuBackend(3, (), level), (6, 3, 64, 64), types, **options)
    for _ in range(12):
        lens = [
            min(int(n), longest - past)
            for n, past in zip(rng.choice([0, 1, 1, 1, 20, 65], n_seqs), pair.n_past, strict=True)
        ]
        if any(lens):
            pair.step(*lens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", ["f16", "q4_0"])
def test_the_number_of_threads_changes_nothing(rng, level, type):
    seed = int(rng.integers(1 << 30))
    results = []
    for n_threads in (1, 2, 3, 1):
        pair = Pair(
            np.random.default_rng(seed), CpuBackend(n_threads, (), level), (8, 2, 64, 64), (type, type), n_blocks=20
        )
        results.append([pair.step(n) for n in (500, 1, 1, 30)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("type", ["f16", "q8_0"])
def test_deep_context(rng, type):
    pair = Pair(rng, CpuBackend(2), (8, 2, 64, 64), (type, type), n_blocks=257)
    batch = pair.batch([8000])
    q, k, v = pair.inputs(8000)
    only_last = AttentionParams(1.0, 0.0, 1, pair.params.kv_heads)  # fills the caches at little cost
    pair.backend.attention(q, k, v, pair.cache, batch, only_last, None)
    pair.reference.store(
        (pair.tables[0, batch.positions // KV_BLOCK] * KV_BLOCK + batch.positions % KV_BLOCK).astype(np.int64),
        k,
        v,
    )
    for n_tokens in (1, 1, 100, 1):
        pair.step(n_tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("type", CACHE_TYPES)
def test_what_others_left_in_a_block_is_not_seen(rng, level, type):
    backend = CpuBackend(1, (), level)
    pair = Pair(rng, backend, (4, 2, 32, 32), (type, type), n_blocks=4)
    huge = np.full((128, 2, 32), np.inf, np.float32)
    backend.attention(pair.random(128, 4, 32), huge, huge, pair.cache, pair.batch([128]), pair.params, None)
    pair.n_past = [0]
    for n_tokens in (5, 1, 1, 40, 1):
        assert np.isfinite(pair.step(n_tokens)).all()


@pytest.mark.parametrize("n_head", [8, 16])
@pytest.mark.parametrize("level", LEVELS)
def test_a_row_that_is_not_finite_spoils_no_other(level, n_head, rng):
    """Rows that share vectors with it still follow scores that grow from span to span."""
    backend, n_past = CpuBackend(1, (), level), 300
    pair = Pair(rng, backend, (n_head, 1, 32, 32), n_blocks=10)
    q, k, v = pair.inputs(n_past + 1)
    k[:, 0] = np.linspace(0, 30, n_past + 1, dtype=np.float32)[:, None]
    backend.attention(q[:-1], k[:-1], v[:-1], pair.cache, pair.batch([n_past]), pair.params, None)
    last = pair.batch([1])
    q = np.abs(q[-1:]) + 1
    expected = backend.attention(q, k[-1:], v[-1:], pair.cache, last, pair.params, None)
    assert np.isfinite(expected).all()
    for bad in range(n_head):
        with_inf = q.copy()
        with_inf[0, bad] = np.inf
        out = backend.attention(with_inf, k[-1:], v[-1:], pair.cache, last, pair.params, None)
        others = np.arange(n_head) != bad
        np.testing.assert_allclose(out[0, others], expected[0, others], rtol=1e-5, atol=1e-6)


def test_scores_far_apart(rng):
    """The largest score decides alone, wherever it is; scores far from 0 neither overflow nor vanish."""
    backend = CpuBackend(2)
    pair = Pair(rng, backend, (2, 1, 32, 32), n_blocks=16, scale=1.0)
    batch = pair.batch([512])
    q, k, v = pair.inputs(512)
    # Multiples of 1/8 and of 1: float32 has the sums exactly, in any order. Scores of a thousand that are about as
    # large would else differ by their rounding, and the weights with them.
    q, k = np.rint(8 * q) / np.float32(8), np.rint(60 * k)
    longest = (0, 200, 511)
    k[longest, :] *= 2
    result = backend.attention(q, k, v, pair.cache, batch, pair.params, None)
    np.testing.assert_allclose(result, attend(q, k, v, pair.reference, batch, pair.params, None), rtol=1e-4, atol=1e-4)
    for where in longest:
        q = np.zeros((1, 2, 32), np.float32)
        q[..., :] = k[where, 0] / np.float32(32)
        expected = v[where, 0]
        again = Batch(
            np.zeros(1, np.int32), np.array([511], np.int32), np.array([1], np.int32), pair.tables, batch.logit_rows
        )
        result = backend.attention(q, k[511:], v[511:], pair.cache, again, pair.params, None)
        np.testing.assert_allclose(result[0], np.stack([expected, expected]), rtol=1e-5, atol=1e-5)


def test_bytes_of_a_cache():
    backend = CpuBackend(1)
    for type in CACHE_TYPES:
        bytes_of_32 = 2 * 3 * row_bytes(type, 32) + 3 * 3 * row_bytes("f16", 32)
        assert backend.new_cache(7, 3, 64, 96, type, "f16").nbytes == 7 * KV_BLOCK * bytes_of_32


@pytest.mark.parametrize("fault", ["block", "no block", "gap", "too many", "too few", "kv head", "negative", "shape"])
def test_indices_out_of_range(rng, fault):
    backend = CpuBackend(1)
    pair = Pair(rng, backend, (4, 2, 32, 32), n_blocks=4)
    batch, params = pair.batch([70]), pair.params
    q, k, v = pair.inputs(70)
    if fault == "block":
        batch.block_tables[0, 1] = 4
    elif fault == "no block":
        batch.block_tables[0, 2] = -1
    elif fault == "gap":
        batch.positions[40:] += 1
    elif fault == "too many":
        batch.seq_lens[0] = 71
    elif fault == "too few":
        batch.seq_lens[0] = 69
    elif fault == "kv head":
        params = AttentionParams(1.0, 0.0, 0, (0, 0, 1, 2))
    elif fault == "negative":
        batch.positions[:] -= 1
    else:
        k = k[:, :1]
    with pytest.raises(ValueError, match=r"\w+ .*"):
        backend.attention(q, k, v, pair.cache, batch, params, None)


def test_many_steps_need_no_more_memory(rng):
    def resident() -> int:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    backend = CpuBackend(2)
    pair = Pair(rng, backend, (8, 2, 64, 64), ("f16", "q8_0"), n_blocks=32)
    pair.step(1000)
    batch = pair.batch([1])
    q, k, v = pair.inputs(1)
    for _ in range(200):
        backend.attention(q, k, v, pair.cache, batch, pair.params, None)
    before = resident()
    for _ in range(3000):
        backend.attention(q, k, v, pair.cache, batch, pair.params, None)
    assert resident() - before < 1 << 20


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("neox", [False, True])
def test_rotation_within(level, neox, rng):
    """Attention that rotates q and k itself gives what it gives after `rope`, to the bit."""
    backend = CpuBackend(2, (), level)
    n_rot = int(rng.integers(1, 25)) * 2
    for n_tokens in (1, 40):
        pair = Pair(rng, backend, (6, 2, 48, 32))
        batch = pair.batch([n_tokens])
        table = backend.rope_table(batch.positions, Rope(n_rot, neox, 1e4), None)
        q, k, v = pair.inputs(n_tokens)
        caches = [backend.new_cache(24, 2, 48, 32, "f32", "f32") for _ in range(2)]
        within = backend.attention(q, k, v, caches[0], batch, pair.params, None, table)
        rotated = (backend.rope(x, table) for x in (q, k))
        np.testing.assert_array_equal(within, backend.attention(*rotated, v, caches[1], batch, pair.params, None))
