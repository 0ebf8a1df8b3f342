"""The emulated device finds the mistakes that it is there to find."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from attention_pair import kept
from gpu_host import EVERY_VARIANT, emulated, needs_compiler
from mpillama.backends.gpu import source
from mpillama.backends.gpu.device import Unit
from mpillama.backends.gpu.emulated import EmulatedDevice
from mpillama.config import Rope

pytestmark = needs_compiler
UNIT = Unit("mistakes.cu")
MISTAKES = """#include "compat.cuh"
template <bool BARRIER> MPL_INLINE void reverse(const float* x, float* out) {
  MPL_DYN_SHARED(float, kept);
  kept[threadIdx.x] = x[threadIdx.x];
  if (BARRIER) __syncthreads();
  out[threadIdx.x] = kept[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void with_barrier(const float* x, float* out) { reverse<true>(x, out); }
MPL_EXPORT(with_barrier)
extern "C" __global__ void without_barrier(const float* x, float* out) { reverse<false>(x, out); }
MPL_EXPORT(without_barrier)
extern "C" __global__ void divergent(const float* x, float* out) {
  if (threadIdx.x % 2) __syncthreads();
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = lanes_sum<MPL_WARP>(x[threadIdx.x]);
}
MPL_EXPORT(divergent)
extern "C" __global__ void lost_lanes(const float* x, float* out) {
  if (threadIdx.x == 3) return;
  out[threadIdx.x] = lanes_sum<MPL_WARP>(x[threadIdx.x]);
}
MPL_EXPORT(lost_lanes)
extern "C" __global__ void beyond(float* out, int n) { out[threadIdx.x + n] = 1.f; }
MPL_EXPORT(beyond)
"""


@pytest.fixture
def mistakes(monkeypatch):
    read = source.read
    monkeypatch.setattr(source, "read", lambda name: MISTAKES if name == UNIT.file else read(name))


def reversed_by(kernel, warp, order, seed, x):
    device = EmulatedDevice(warp, order, seed)
    out = device.empty(x.shape)
    device.launch(UNIT, kernel, (1,), x.size, (device.upload(x), out), 4 * x.size)
    return device.download(out)


def test_a_missing_barrier_changes_results(mistakes, rng):
    x = rng.standard_normal(128).astype("f4")
    for warp in (32, 64):
        for order in (0, 1, 2):
            assert (reversed_by("with_barrier", warp, order, 5, x) == x[::-1]).all()
        assert any((reversed_by("without_barrier", warp, order, 5, x) != x[::-1]).any() for order in (0, 1, 2))


@pytest.mark.parametrize(("kernel", "said"), [("divergent", "not all threads"), ("lost_lanes", "lost lanes")])
def test_what_would_hang_is_an_error_and_the_device_still_works(mistakes, kernel, said, rng):
    x = rng.standard_normal(64).astype("f4")
    for order in (0, 1, 2):
        with pytest.raises(RuntimeError, match=said):
            reversed_by(kernel, 32, order, 5, x)
        assert (reversed_by("with_barrier", 32, order, 5, x) == x[::-1]).all()


def test_wrong_arguments_are_refused(mistakes):
    device = EmulatedDevice()
    x = device.empty((64,))

    def launch(*args, kernel="with_barrier", block=64, grid=(1,)):
        device.launch(UNIT, kernel, grid, block, args, 256)

    for args, said in (
        ((np.zeros(64, "f4"), x), "not in device memory"),
        ((x,), "takes 2 arguments"),
        ((x, device.empty((64,), np.int32)), "int32"),
        ((x, x[::2]), "contiguous"),
    ):
        with pytest.raises(TypeError, match=said):
            launch(*args)
    with pytest.raises(TypeError, match="argument 1 is int64, not int32"):
        launch(x, np.int64(3), kernel="beyond")
    for options in ({"block": 48}, {"block": 2048}, {"grid": (0,)}, {"grid": (1, 70000)}):
        with pytest.raises(ValueError, match="grid"):
            launch(x, x, **options)


@pytest.mark.parametrize(("warp", "order"), EVERY_VARIANT)
def test_ops_of_rows_and_heads_in_every_order(warp, order, rng):
    """Those of `elementwise.cu` and `experts.cu`, with random sizes, against NumPy in float64."""
    backend = emulated(warp, order, int(rng.integers(1 << 30)))
    n_tokens, short, long = int(rng.integers(1, 9)), int(rng.integers(1, 1025)), int(rng.integers(1025, 2200))
    for n in (short, long):
        x, w = rng.standard_normal((n_tokens, n)).astype("f4"), rng.standard_normal(n).astype("f4")
        exact = x.astype("f8")
        squares = (exact**2).sum(-1, keepdims=True)
        np.testing.assert_allclose(backend.rms_norm(x, w, 1e-5), exact / np.sqrt(squares / n + 1e-5) * w, rtol=1e-5)
        start = int(rng.integers(0, n))
        some = (exact[:, start:] ** 2).sum(-1, keepdims=True)
        np.testing.assert_allclose(backend.sum_squares(x, start, n), some, rtol=1e-5)
        mean = squares.astype("f4") / np.float32(n)
        scaled = backend.scale_by_mean_square(x, mean, w, 1e-5)
        np.testing.assert_allclose(scaled, exact / np.sqrt(squares / n + 1e-5) * w, rtol=1e-5)

    n_expert = int(rng.integers(1, 300))
    n_used = int(rng.integers(1, min(n_expert, 2 * warp) + 1))
    logits = rng.standard_normal((n_tokens, n_expert)).astype("f4")
    index, weights = backend.route(logits, n_used, "softmax", False)
    np.testing.assert_array_equal(index, np.argsort(-logits, -1, kind="stable")[:, :n_used])
    powers = np.exp(logits.astype("f8"))
    np.testing.assert_allclose(weights, np.take_along_axis(powers / powers.sum(-1, keepdims=True), index, 1), rtol=1e-5)
    k, rows = int(rng.integers(1, 130)), rng.standard_normal((2, long + 1000)).astype("f4")
    columns = np.argsort(-rows, -1, kind="stable")[:, :k]
    expected = np.concatenate([np.take_along_axis(rows, columns, 1), columns], 1)
    np.testing.assert_array_equal(backend.top_k(rows, k, 0), expected.astype("f4"))
    answers = rng.standard_normal((n_tokens, n_used, short)).astype("f4")
    exact = np.einsum("tkn,tk->tn", answers.astype("f8"), weights)
    np.testing.assert_allclose(backend.sum_experts(answers, weights), exact, atol=1e-5, rtol=1e-5)
    np.testing.assert_array_equal(backend.take(answers[:, 0], index % n_tokens), answers[:, 0][index % n_tokens])
    upload, parts = backend.backend.device.upload, [rows[:, : k + i].copy() for i in range(3)]
    joined = backend.to_host(backend.backend.join(list(map(upload, parts))))
    np.testing.assert_array_equal(joined, np.concatenate(parts, 1))
    for bf16, rounded in ((False, rows.astype("f2").astype("f4")), (True, kept(rows, "bf16"))):
        wide = upload(np.zeros_like(rows))
        backend.backend.widen(backend.backend.narrow(upload(rows), bf16), bf16, wide)
        np.testing.assert_array_equal(backend.to_host(wide), rounded)
    stored, places = rng.integers(0, 256, (9, 2, 48)).astype("u1"), rng.permutation(9)[:4].astype("i4")
    moved = upload(np.zeros_like(stored))
    backend.backend.move_rows(upload(stored), upload(places), moved, upload(places[::-1].copy()))
    expected = np.zeros_like(stored)
    expected[places[::-1]] = stored[places]
    np.testing.assert_array_equal(backend.to_host(moved), expected)

    heads, half = rng.standard_normal((n_tokens, 3, 2 * short)).astype("f4"), int(rng.integers(1, short + 1))
    neox = bool(rng.integers(2))
    table = backend.rope_table(np.arange(7, 7 + n_tokens, dtype="i4"), Rope(2 * half, neox, 1e4), None)
    angles = np.arange(7, 7 + n_tokens)[:, None, None] * 1e4 ** (-np.arange(half) / half)
    a, b = (
        (heads[..., :half], heads[..., half : 2 * half])
        if neox
        else (heads[..., 0 : 2 * half : 2], heads[..., 1 : 2 * half : 2])
    )
    turned = (a + 1j * b) * np.exp(1j * angles)
    found = backend.rope(heads, table)
    c, d = (
        (found[..., :half], found[..., half : 2 * half])
        if neox
        else (found[..., 0 : 2 * half : 2], found[..., 1 : 2 * half : 2])
    )
    np.testing.assert_allclose(c + 1j * d, turned, atol=1e-5)
    np.testing.assert_array_equal(found[..., 2 * half :], heads[..., 2 * half :])


SANITIZED = """
import sys
import numpy as np
sys.path[:0] = {path!r}
from gpu_host import RawWeight, emulated
from mpillama.backends.gpu import source
from mpillama.backends.gpu.device import Unit
from mpillama.gguf.types import GGMLType
from test_gpu_emulator import MISTAKES, UNIT
from test_gpu_attention import Pair
from tiny import random_blocks
rng = np.random.default_rng({seed})
backend = emulated(32, 2, 3, sanitize=True)
for type in {types}:
    raw = random_blocks(rng, GGMLType[type], (3, 37, 256))
    w = backend.weight(RawWeight("w", GGMLType[type], raw, 256))
    for n in (1, 5, 40):
        x = rng.standard_normal((n, 256)).astype("f4")
        backend.linear(x, w)
        backend.expert_linear(x, w, rng.integers(-1, 3, (n, 2)).astype("i4"))
    backend.embedding(np.array([0, 36, 37, -1], "i4"), w, 0)
pair = Pair(rng, backend, (6, 2, 64, 32), ("f16", "q8_0"), n_blocks=6, sinks=True)
for n in (33, 1, 100):
    pair.step(n)
backend.route(rng.standard_normal((5, 7)).astype("f4"), 3, "softmax", True)
backend.top_k(rng.standard_normal((2, 2500)).astype("f4"), 7, 0)
backend.rms_norm(rng.standard_normal((3, 2000)).astype("f4"), np.ones(2000, "f4"), 1e-5)
backend.rms_norm(rng.standard_normal((3, 2001)).astype("f4"), np.ones(2001, "f4"), 1e-5)
h, table, index = np.ones((3, 160), "f4"), np.ones((4, 160), "f4"), rng.integers(0, 4, (3, 2)).astype("i4")
answers = rng.standard_normal((3, 2, 160)).astype("f4")
backend.add_norm(h, answers, h[0], 1e-5, h[1], 1.0, answers[..., 0].copy(), table, index)
backend.gated("gelu", answers, answers, tuple(map(backend.backend.device.upload, (table, table, index))))
backend.rope(rng.standard_normal((3, 2, 10)).astype("f4"), backend.rope_table(np.arange(3, dtype="i4"), {rope}, None))
for warp, type in ((32, {types}[0]), (64, "F16")):
    units = emulated(warp, 2, 3, sanitize=True, matrix_units=True)
    raw = random_blocks(rng, GGMLType[type], (3, 37, 256))
    w, x = units.weight(RawWeight("w", GGMLType[type], raw, 256)), rng.standard_normal((70, 256)).astype("f4")
    units.linear(x, w)
    units.expert_linear(x, w, rng.integers(-1, 3, (70, 2)).astype("i4"))
units = emulated(32, 2, 3, sanitize=True, matrix_units=True)
pair = Pair(rng, units, (6, 2, 64, 32), ("f16", "q8_0"), n_blocks=6, sinks=True)
for n in (33, 1, 100):
    pair.error(n)
units.copy_blocks(pair.cache, np.array([[0, 5], [1, 4]], "i4"))
units.write_blocks(pair.cache, np.array([5, 2], "i4"), *units.read_blocks(pair.cache, np.array([3, 0], "i4")))
parts = [np.ascontiguousarray(part) for part in (answers[:, 0], h[:, :7], answers[:, 1, :33])]
units.join(list(map(units.backend.device.upload, parts)))
units.take(table, units.held(index, 0, 4))
units.add_taken(answers, table, units.held(index, 1, 3))
units.as_index(units.as_numbers(index))
for bf16 in (False, True):
    units.widen(units.narrow(h, bf16), bf16, h)
print("clean", flush=True)
read = source.read
source.read = lambda name: MISTAKES if name == UNIT.file else read(name)
device = backend.device
device.launch(UNIT, "beyond", (1,), 64, (device.empty((100,)), np.int32(40)))
"""


def test_address_sanitizer_sees_no_fault_but_the_one_that_is_there(rng):
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(library).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    types = [str(name) for name in rng.choice(["Q4_K", "Q6_K", "IQ3_S", "MXFP4", "TQ1_0", "F16"], 2, replace=False)]
    rope = "__import__('mpillama.config', fromlist='Rope').Rope(n_rot=6, neox=True, freq_base=100.0)"
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = SANITIZED.format(path=path, seed=int(rng.integers(1 << 30)), types=types, rope=rope)
    environment = {"LD_PRELOAD": library, "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0"}
    environment["PATH"] = "/usr/local/bin:/usr/bin:/bin"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "clean", (types, done.stderr[-3000:])
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
