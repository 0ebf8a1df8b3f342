"""Attention of the GPU backend against NumPy's, on what the cache has kept, on the emulated device."""

import re

import numpy as np
import pytest

from attention_pair import Pair, kept
from gpu_host import EVERY_VARIANT, VARIANTS, emulated, needs_compiler
from mpillama.backends.attention import attend
from mpillama.backends.base import KV_BLOCK, AttentionParams
from mpillama.backends.kv_codec import CACHE_TYPES, row_bytes
from mpillama.errors import UsageError

pytestmark = needs_compiler


def any_variant(rng, **options):
    warp, order = VARIANTS[rng.integers(len(VARIANTS))]
    return emulated(warp, order, int(rng.integers(1 << 30)), **options)


@pytest.mark.parametrize(
    "types", [("f32", "f16"), ("bf16", "bf16"), ("f16", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "f32")]
)
def test_types_with_windows_softcap_and_sinks(rng, types):
    for window, softcap, sinks in ((0, 0.0, False), (5, 0.0, True), (100, 3.0, False)):
        options = {"window": window, "softcap": softcap, "sinks": sinks, "n_seqs": 2}
        pair = Pair(rng, any_variant(rng), (6, 2, 64, 32), types, **options)
        for lens in ((70, 5), (1, 1), (0, 1), (30, 130), (1, 1)):
            pair.step(*lens)


@pytest.mark.parametrize("size", [(6, 6), (1, 1), (10, 3), (24, 40), (80, 80), (192, 128), (256, 256), (576, 512)])
def test_sizes_of_heads(rng, size):
    pair = Pair(rng, any_variant(rng), (6, 2, *size), ("f16", "f16"))
    for n_tokens in (33, 1, 7, 40, 1):
        pair.step(n_tokens)


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
def test_splits_warps_and_orders(rng, warp, order, monkeypatch):
    monkeypatch.setattr("mpillama.backends.gpu.attention._SPLIT_KEYS", 40)
    backend = emulated(warp, order, int(rng.integers(1 << 30)))
    backend.device.n_cores = 100
    options = {"sinks": bool(rng.integers(2)), "window": int(rng.choice([0, 150])), "n_seqs": 2, "n_blocks": 40}
    pair = Pair(rng, backend, (8, 2, 32, 40), ("f16", "f16"), **options)
    for lens in ((300, 3), (1, 1), (3, 1), (0, 200), (1, 1)):
        pair.step(*lens)


def test_any_map_of_heads(rng):
    maps = [(0, 0, 0, 1), (0, 2, 2), (1, 1, 0, 2, 0), (2,), tuple(range(3)) * 10, (0,) * 70]
    for heads in (*maps, tuple(rng.integers(0, 3, 9).tolist())):
        pair = Pair(rng, any_variant(rng), (len(heads), 3, 32, 32), ("f16", "q8_0"), kv_heads=heads)
        for n_tokens in (50, 1, 9, 2):
            pair.step(n_tokens)


def test_what_others_left_in_a_block_is_not_seen(rng):
    for type in ("f32", "q8_0"):
        pair = Pair(rng, any_variant(rng), (4, 2, 32, 32), (type, type), n_blocks=4)
        huge = np.full((128, 2, 32), np.inf, np.float32)
        pair.backend.attention(pair.random(128, 4, 32), huge, huge, pair.cache, pair.batch([128]), pair.params, None)
        pair.n_past = [0]
        for n_tokens in (5, 1, 40, 1):
            assert np.isfinite(pair.step(n_tokens)).all()


@pytest.mark.parametrize("type", sorted(CACHE_TYPES))
def test_rounding(rng, type):
    """A token that sees itself only gets the value that the cache has kept."""
    pair = Pair(rng, any_variant(rng), (1, 1, 32, 96), ("f32", type), window=1)
    batch = pair.batch([300])
    q, k, _ = pair.inputs(300)
    v = pair.random(300, 1, 96) * (10.0 ** rng.uniform(-7, 3, (300, 1, 1))).astype(np.float32)
    v[0] = 0
    result = pair.backend.attention(q, k, v, pair.cache, batch, pair.params, None)
    wrong = result != kept(v, type)
    if type in ("q8_0", "q4_0"):
        # A value in the middle of two may go to either.
        assert wrong.mean() < 1e-3
        steps = np.abs(v).reshape(300, 1, 3, 32).max(axis=-1).repeat(32, axis=-1) / (127 if type == "q8_0" else 8)
        assert (np.abs(result - v) <= 1.01 * steps + 1e-7)[wrong].all()
    else:
        assert not wrong.any()


def test_a_rank_without_query_heads_keeps_its_keys(rng):
    backend = emulated()
    pair = Pair(rng, backend, (4, 2, 32, 32), ("f16", "f16"))
    batch = pair.batch([40])
    q, k, v = pair.inputs(40)
    nobody = AttentionParams(1.0, 0.0, 0, ())
    assert backend.attention(q[:, :0], k, v, pair.cache, batch, nobody, None).shape == (40, 0, 32)
    attend(q, k, v, pair.reference, batch, pair.params, None)
    pair.step(1)
    none = backend.new_cache(24, 0, 32, 32, "f16", "f16")
    assert backend.attention(q[:, :0], k[:, :0], v[:, :0], none, batch, nobody, None).shape == (40, 0, 32)


def test_bytes_of_a_cache_and_types_that_do_not_fit():
    backend = emulated()
    for type in CACHE_TYPES:
        bytes_of_32 = 2 * 3 * row_bytes(type, 32) + 3 * 3 * row_bytes("f16", 32)
        assert backend.new_cache(7, 3, 64, 96, type, "f16").nbytes == 7 * KV_BLOCK * bytes_of_32
    said = "values of 80 elements cannot be cached as q8_0; choose one of f32, f16, bf16"
    with pytest.raises(UsageError, match=re.escape(said) + "$"):
        backend.new_cache(1, 1, 64, 80, "q4_0", "q8_0")
    with pytest.raises(UsageError, match="keys cannot be cached as q5_1; choose one of f32, f16, bf16, q8_0, q4_0"):
        backend.new_cache(1, 1, 64, 64, "q5_1", "f16")


@pytest.mark.parametrize("fault", ["block", "no block", "gap", "too many", "too few", "kv head", "negative", "shape"])
def test_indices_out_of_range(rng, fault):
    backend = emulated()
    pair = Pair(rng, backend, (4, 2, 32, 32), n_blocks=4)
    batch, params = pair.batch([70]), pair.params
    q, k, v = pair.inputs(70)
    if fault == "block":
        batch.block_tables[0, 1] = 4
    elif fault == "no block":
        batch.block_tables[0, 2] = -1
    elif fault == "gap":
        batch.positions[40:] += 1
    elif fault in ("too many", "too few"):
        batch.seq_lens[0] = 71 if fault == "too many" else 69
    elif fault == "kv head":
        params = AttentionParams(1.0, 0.0, 0, (0, 0, 1, 2))
    elif fault == "negative":
        batch.positions[:] -= 1
    else:
        k = k[:, :1]
    with pytest.raises(ValueError, match=r"\w+ .*"):
        backend.attention(q, k, v, pair.cache, batch, params, None)
