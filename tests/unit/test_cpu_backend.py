"""The cpu backend as a whole: its threads, the choice of it, and models on it against llama.cpp and the reference."""

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from mpillama.backends import make_backend
from mpillama.backends.base import RawWeight
from mpillama.backends.reference import ReferenceBackend
from mpillama.errors import UsageError
from mpillama.gguf.types import GGMLType
from shared import shared
from tiny import nmse, random_blocks, rounded_to_int8, run_on, write_llama

_cpu = pytest.importorskip("mpillama._cpu", reason="the cpu backend is not built")
from mpillama.backends.cpu.backend import CpuBackend  # noqa: E402

GOLDEN = ("llama-dense", "gemma2-dense", "olmoe-moe", "gpt-oss-moe")


@pytest.mark.parametrize("level", _cpu.levels())
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_models(name, level):
    reference = np.load(shared("golden", f"{name}.npz"))
    path, tokens = shared("golden", f"{name}.gguf"), reference["tokens"].tolist()
    for weights, chunk in (([1.0], 24), ([1.0], 1), ([2.0, 1.0, 1.0], 7)):
        results = run_on(path, tokens, weights, chunk, make=lambda: CpuBackend(2, (), level))
        assert nmse(results[0], reference["logits"]) <= 1e-6
        for other in results[1:]:
            np.testing.assert_array_equal(other, results[0])


class RoundingReference(ReferenceBackend):
    """The reference with the one thing that the cpu backend does differently: activations rounded to 8 bits."""

    def _matmul(self, x, w, mat):
        if w.type in (GGMLType.F32, GGMLType.F16):
            return super()._matmul(x, w, mat)
        x = np.pad(x, ((0, 0), w.pad))
        return super()._matmul(rounded_to_int8(x).astype(np.float32), replace(w, pad=(0, 0)), mat)


@pytest.mark.parametrize("type", [GGMLType.Q4_0, GGMLType.Q8_0, GGMLType.Q4_K, GGMLType.MXFP4], ids=lambda t: t.name)
def test_quantized_models_on_several_ranks(type, tmp_path, rng):
    # 12 heads of 64 on 4 ranks end inside 256-wide blocks, and so do the 768 columns of experts. All are used: the
    # last bit of a router's sum must not decide what is compared.
    path = write_llama(tmp_path / "m.gguf", rng, type, n_head=12, n_ff=768, n_expert=3, n_expert_used=3)
    prompts = rng.integers(0, 96, (3, 10)).tolist()
    level = "avx512" if "amx" in _cpu.levels() else ""
    for weights in ([1.0], [1.0] * 4, [2.0, 1.0]):
        references = [run_on(path, tokens, weights, make=RoundingReference)[0] for tokens in prompts]
        for chunk in (10, 1):
            results = [
                run_on(path, tokens, weights, chunk, make=lambda: CpuBackend(2, (), level))[0] for tokens in prompts
            ]
            # The last bit of a sum may round an activation to its neighbour, which later tokens then see: one of
            # the first token all of its prompt.
            far = [[nmse(*pair) for pair in zip(*both, strict=True)] for both in zip(results, references, strict=True)]
            assert np.median([min(each) for each in far]) < 1e-10, (weights, chunk, far)
            assert np.max(far) < 1e-2, (weights, chunk, far)


def test_make_backend():
    assert make_backend("reference").name == "reference"
    assert type(make_backend("reference")) is ReferenceBackend
    cpu = make_backend("cpu", 2, level="scalar")
    assert (cpu.name, cpu.pool.level, cpu.pool.n_threads) == ("cpu", "scalar", 2)
    # Elsewhere, since tests may have trapped tiles here.
    best = "from mpillama import _cpu, backends; assert backends.make_backend().pool.level == _cpu.levels()[-1]"
    subprocess.run([sys.executable, "-c", best], check=True)
    with pytest.raises(UsageError, match="no backend vulkan"):
        make_backend("vulkan")
    with pytest.raises(UsageError, match=r"CPU level sse9 is not available; this machine has scalar"):
        make_backend("cpu", level="sse9")


def test_idle_threads_sleep(rng):
    backend = CpuBackend(3)
    w = backend.weight(RawWeight("w", GGMLType.Q8_0, random_blocks(rng, GGMLType.Q8_0, (1, 512, 256)), 256))
    x = np.ones((1, 256), np.float32)
    expected = backend.linear(x, w)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.5)
    assert time.process_time() - before < 0.1
    np.testing.assert_array_equal(backend.linear(x, w), expected)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux only")
def test_threads_stay_on_their_cores():
    allowed = os.sched_getaffinity(0)
    before = {int(task) for task in os.listdir("/proc/self/task")}
    cores = sorted(allowed)[:2]
    try:
        pool = _cpu.Pool(3, cores)
        backend = CpuBackend(1)
        del backend
        time.sleep(0.05)
        masks = {task: os.sched_getaffinity(int(task)) for task in os.listdir("/proc/self/task")}
        new = [mask for task, mask in masks.items() if int(task) not in before]
        assert sorted(map(sorted, new)) == sorted([cores[i % len(cores)]] for i in (1, 2))
        assert os.sched_getaffinity(0) == {cores[0]}
        del pool
    finally:
        os.sched_setaffinity(0, allowed)
    assert {int(task) for task in os.listdir("/proc/self/task")} <= before


PINNED = """
import os, time
import numpy as np
from mpillama import _cpu
cores = sorted(os.sched_getaffinity(0))
pool = _cpu.Pool(2, cores)
allowed = {frozenset(os.sched_getaffinity(int(task))) for task in os.listdir("/proc/self/task")}
x, out = np.ones(1 << 20, np.float32), np.empty(1 << 20, np.float32)
for _ in range(20):
    _cpu.sigmoid(pool, x, out)
time.sleep(0.1)
before = time.process_time()
time.sleep(0.5)
print(len(cores), all(mask <= set(cores) for mask in allowed), time.process_time() - before < 0.05)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads are pinned on Linux only")
def test_threads_within_a_cpuset():
    """A launcher or taskset may leave a process one core, whichever: it works there, and waits without using it."""
    for core in sorted(os.sched_getaffinity(0)):
        result = subprocess.run(
            [sys.executable, "-c", PINNED],
            preexec_fn=lambda core=core: os.sched_setaffinity(0, {core}),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert result.stdout.split() == ["1", "True", "True"], result.stderr


def test_callers_on_several_threads_take_turns(rng):
    backend = CpuBackend(2)
    w = backend.weight(RawWeight("w", GGMLType.Q4_0, random_blocks(rng, GGMLType.Q4_0, (1, 300, 512)), 512))
    xs = [rng.standard_normal((n, 512)).astype(np.float32) for n in (1, 3, 20)]
    expected = [backend.linear(x, w) for x in xs]
    wrong: list[int] = []

    def work(i):
        for _ in range(100):
            if not np.array_equal(backend.linear(xs[i], w), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_streaming_speed_is_a_speed():
    assert 0.1 < _cpu.stream_gbps(_cpu.Pool(2), 1 << 26, 0.05) < 10000
