"""Attention of prompts on matrix units (attention_mma.cu) against float64, on what the cache has kept.

Queries are rounded to float16: a score, which is a sum of products, is wrong by at most 2^-11 of the sum of their
sizes, and by about 2e-4 of the root of the sum of their squares. Scores of `Pair` have a spread of 2, so weights are
wrong by about 4e-4 of what they are; rounding them adds 2e-4. That makes 5e-4 of the result's norm.
"""

import functools

import numpy as np
import pytest

from attention_pair import Pair
from gpu_host import REAL, emulated, gpu_backend, needs_compiler, only_emulated, skip_without
from mpillama.backends.gpu import attention, source
from mpillama.backends.gpu.attention import tiles_unit
from mpillama.backends.gpu.cupy_device import CupyDevice
from mpillama.backends.gpu.device import Unit
from mpillama.backends.gpu.emulated import EmulatedDevice
from mpillama.gguf.types import GGMLType
from tiny import nmse, run_on, write_llama

pytestmark = needs_compiler
ALL, WORST = 1e-3, 4e-3


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The kernels that were started, by name."""
    device = CupyDevice if REAL else EmulatedDevice
    if REAL:
        real = gpu_backend(matrix_units=True).device
        skip_without("matrix units for attention", real.matrix_units and real.warp == 32)
    names, launch = [], device.launch

    def note(self, unit, kernel, *args):
        names.append(kernel)
        launch(self, unit, kernel, *args)

    monkeypatch.setattr(device, "launch", note)
    return names


def on_units(rng, order=None, **options):
    order = int(rng.integers(3)) if order is None else order
    return emulated(32, order, int(rng.integers(1 << 30)), matrix_units=True, **options)


def check(pair, *seq_lens):
    everything, worst, result = pair.error(*seq_lens)
    assert everything < ALL, seq_lens
    assert worst < WORST, seq_lens
    return result


def many_rows(names):
    """How many of the launches were of the kernel on matrix units."""
    return sum(name.startswith("attend_tiles") for name in names)


TYPES = [("f16", "f16"), ("bf16", "bf16"), ("f16", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "f16")]


@pytest.mark.parametrize("types", TYPES)
def test_types_with_windows_softcap_and_sinks(rng, types, launched):
    for window, softcap, sinks in ((0, 0.0, False), (5, 0.0, True), (100, 3.0, False)):
        options = {"window": window, "softcap": softcap, "sinks": sinks, "n_seqs": 2}
        pair = Pair(rng, on_units(rng), (6, 2, 64, 32), types, **options)
        for lens in ((40, 5), (1, 1), (0, 1), (30, 100), (3, 1)):
            check(pair, *lens)
    assert many_rows(launched) == 3 * 3


@pytest.mark.parametrize(
    "size", [(16, 48), (32, 16), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)]
)
def test_sizes_of_heads(rng, size, launched):
    pair = Pair(rng, on_units(rng), (6, 2, *size), ("f16", "f16"))
    for n_tokens in (33, 1, 7, 40):
        check(pair, n_tokens)
    assert many_rows(launched) == 3


@pytest.mark.parametrize("order", [0, 1, 2])
def test_splits_and_orders(rng, order, monkeypatch, launched):
    monkeypatch.setattr(attention, "_SPLIT_KEYS", 40)
    backend = on_units(rng, order)
    backend.device.n_cores = 100
    options = {"sinks": bool(rng.integers(2)), "window": int(rng.choice([0, 150])), "n_seqs": 2, "n_blocks": 40}
    pair = Pair(rng, backend, (8, 2, 32, 48), ("f16", "f16"), **options)
    for lens in ((300, 3), (1, 1), (3, 1), (0, 200), (1, 17)):
        check(pair, *lens)
    assert many_rows(launched) == 4
    # Other kernels join their splits themselves.
    assert launched.count("combine") == 4


def test_every_order_gives_the_same_bits(rng):
    """Copies may arrive at once or as late as they may; no sum depends on it."""
    seed, results = int(rng.integers(1 << 30)), []
    for order in (0, 1, 2):
        pair = Pair(np.random.default_rng(seed), on_units(rng, order), (4, 1, 64, 64), ("f16", "q8_0"), window=90)
        results.append([check(pair, n) for n in (75, 130)])
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_any_map_of_heads(rng, launched):
    maps = [(0, 0, 0, 1), (0, 2, 2), (1, 1, 0, 2, 0), (2,), tuple(range(3)) * 10, (0,) * 70, (1,) * 150]
    for heads in (*maps, tuple(rng.integers(0, 3, 9).tolist())):
        pair = Pair(rng, on_units(rng), (len(heads), 3, 32, 32), ("f16", "q8_0"), kv_heads=heads)
        for n_tokens in (50, 1, 9, 2):
            check(pair, n_tokens)
    # All of 50 tokens; 9 are more than 8 rows too; 2 are where more than 4 heads share a KV head.
    assert 2 * 8 <= many_rows(launched) <= 3 * 8


@pytest.mark.parametrize("type", ["f16", "bf16", "q8_0"])
def test_what_others_left_in_a_block_is_not_seen(rng, type):
    for junk in (np.inf, np.nan):
        pair = Pair(rng, on_units(rng), (4, 2, 32, 32), (type, type), n_blocks=8)
        bad = np.full((256, 2, 32), junk, np.float32)
        pair.backend.attention(pair.random(256, 4, 32), bad, bad, pair.cache, pair.batch([256]), pair.params, None)
        pair.n_past = [0]
        for n_tokens in (5, 1, 40, 60):
            assert np.isfinite(check(pair, n_tokens)).all()


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e7, 1e30])
def test_queries_of_any_size(rng, size):
    """Each row of queries has a power of two of its own; the keys are as large as makes scores usual ones."""
    pair = Pair(rng, on_units(rng), (2, 1, 64, 64), ("bf16", "f16"), scale=0.125 / size)
    draw = pair.inputs
    pair.inputs = lambda n: (draw(n)[0] * np.float32(size), *draw(n)[1:])
    for n_tokens in (40, 70):
        check(pair, n_tokens)


def test_small_weights_count(rng):
    """One key has a weight of 1, all others of 1.1e-7 each: two units of the last place that float16 has."""
    pair = Pair(rng, on_units(rng), (1, 1, 16, 16), ("f16", "f16"), n_blocks=40, scale=1.0)
    n = 1200
    q, k, v = np.zeros((n, 1, 16), "f4"), np.zeros((n, 1, 16), "f4"), np.ones((n, 1, 16), "f4")
    q[:, 0, 0], k[0, 0, 0] = 4, 4
    v[0] = 0
    result = pair.backend.attention(q, k, v, pair.cache, pair.batch([n]), pair.params, None)
    small = np.arange(n)[:, None, None] * np.exp(-16.0)
    np.testing.assert_allclose(result, np.repeat(small / (1 + small), 16, axis=2), rtol=1e-3)


def test_numbers_beyond_float16_become_its_largest(rng):
    for type in ("bf16", "q8_0", "q4_0"):
        pair = Pair(rng, on_units(rng), (4, 1, 32, 32), ("f16", type), window=1)
        q, k, v = pair.inputs(20)
        v[3, 0, :5], v[7, 0, :9] = 4e5, -3e5
        result = pair.backend.attention(q, k, v, pair.cache, pair.batch([20]), pair.params, None)
        np.testing.assert_allclose(result[3, :, :5], 65504, rtol=1e-5)
        np.testing.assert_allclose(result[7, :, :9], -65504, rtol=1e-5)
        np.testing.assert_allclose(result[:3], np.repeat(v[:3], 4, 1), rtol=1e-3, atol=1e-3)


def test_where_there_are_no_matrix_units_or_floats_are_kept(rng, launched):
    for backend, types, size in (
        (emulated(64, 0, 1, matrix_units=not REAL), ("f16", "f16"), 32),
        (emulated(32, 0, 1), ("f16", "f16"), 32),
        (on_units(rng), ("f32", "f16"), 32),
        (on_units(rng), ("f16", "f32"), 32),
        (on_units(rng), ("f16", "f16"), 40),
    ):
        pair = Pair(rng, backend, (4, 2, size, size), types)
        for n_tokens in (50, 1):
            pair.step(n_tokens)
    assert many_rows(launched) == 0
    assert tiles_unit(GGMLType.F16, GGMLType.F16, 576, 512) is None


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_logits_of_a_model(rng, kv_type, tmp_path, launched):
    """With and without matrix units: what the rounding of queries and weights does to logits."""
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.F32, n_embd=64, n_ff=64, n_head=4, n_head_kv=2, n_head_dim=32)
    tokens = rng.integers(0, 96, 50).tolist()
    make = functools.partial(gpu_backend, 32, int(rng.integers(3)))
    exact = run_on(path, tokens, [1.0], 20, kv_type, make=make)[0]
    # Where a key is between two codes of the cache, a small difference becomes a large one.
    bound = 1e-6 + 0.1 * nmse(exact, run_on(path, tokens, [1.0], 20, "f32", make=make)[0])
    assert many_rows(launched) == 0
    for weights in ([1.0], [1.0, 2.0]):
        result = run_on(path, tokens, weights, 20, kv_type, make=functools.partial(make, matrix_units=True))[0]
        error = nmse(result, exact)
        assert 0 < error < bound
    assert many_rows(launched) > 0


MATRICES = """#include "mma.cuh"
extern "C" __global__ void multiply(const unsigned short* a, const unsigned short* b, float* c) {
  MPL_DYN_SHARED(u8, memory);
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const SharedAt left = shared_at(memory), right = left + 16 * 48;
  // Rows of 16 halves, 48 bytes apart: lane i brings half a row.
  copy_16(left + lane / 2 * 48 + lane % 2 * 16, (const u8*)a + 16 * lane, false);
  copy_16(right + lane / 2 * 48 + lane % 2 * 16, (const u8*)b + 16 * lane, false);
  if (WAIT) wait_for_copies();
  __syncwarp();
  u32 x[4], y[4];
  float z[2][4];
  load_matrices<false>(x, left + (lane / 8 % 2 * 8 + lane % 8) * 48 + lane / 16 * 16);
  load_matrices<true>(y, right + (lane / 8 % 2 * 8 + lane % 8) * 48 + lane / 16 * 16);
  for (int half = 0; half < 2; half++) {
    for (int i = 0; i < 4; i++) z[half][i] = c[(g + i / 2 * 8) * 16 + 8 * half + 2 * t + i % 2];
    mma_half(z[half], x, y[2 * half], y[2 * half + 1], false);
    for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 16 + 8 * half + 2 * t + i % 2] = z[half][i];
  }
  wait_for_copies();
}
MPL_EXPORT(multiply)
"""


@only_emulated
@pytest.mark.parametrize("wait", [1, 0])
def test_a_product_of_two_matrices(rng, wait, monkeypatch):
    read = source.read
    monkeypatch.setattr(source, "read", lambda name: MATRICES if name == "matrices.cu" else read(name))
    a, b = (rng.standard_normal((16, 16)).astype(np.float16) for _ in "ab")
    c = rng.standard_normal((16, 16)).astype(np.float32)
    expected, right = a.astype(float) @ b.astype(float) + c, []
    for order in (0, 1, 2):
        device = EmulatedDevice(32, order, 3)
        out = device.upload(c)
        args = device.upload(a.view(np.uint16)), device.upload(b.view(np.uint16)), out
        device.launch(Unit("matrices.cu", (("WAIT", wait),)), "multiply", (1,), 32, args, 1536)
        right.append(np.allclose(device.download(out), expected, rtol=1e-6, atol=1e-5))
    # Without waiting for copies it is only right where they are done at once.
    assert right == ([True] * 3 if wait else [True, False, False])
