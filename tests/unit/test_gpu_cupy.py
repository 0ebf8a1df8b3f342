"""The CuPy device and the choice of GPUs, against a stand-in for CuPy; and what is said when something is missing."""

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import test_gpu_steps

import fake_cupy
import mpillama.runner
import run_gpu
from gpu_host import needs_compiler
from mpillama.backends import make_backend
from mpillama.backends.base import RawWeight
from mpillama.backends.gpu.cupy_device import CupyDevice
from mpillama.backends.gpu.driver import compile_failure, list_gpus
from mpillama.backends.quants import dequantize
from mpillama.cli.gpus import GpuWish, choose_gpu
from mpillama.cli.memory import fit_memory
from mpillama.comm.solo import SoloWorld
from mpillama.comm.threads import run_threads
from mpillama.errors import PeerFailure, UsageError, UserError
from mpillama.gguf.types import GGMLType
from shared import shared
from tiny import nmse, random_blocks, rounded_to_int8, run_on


@pytest.fixture
def install(monkeypatch):
    def put(**options):
        monkeypatch.setitem(sys.modules, "cupy", fake_cupy.fake_cupy(**options))
        libs = SimpleNamespace(cublas=fake_cupy.CUBLAS)
        monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", libs)
        for name in ("cupy_backends", "cupy_backends.cuda"):
            monkeypatch.setitem(sys.modules, name, SimpleNamespace())

    return put


@needs_compiler
def test_products_through_the_cupy_device(install, rng, monkeypatch):
    install()
    monkeypatch.setattr("mpillama.backends.gpu.cupy_device._PIECE", 1000)
    monkeypatch.setattr("mpillama.backends.gpu.cupy_device._GEMM_TOKENS", 40)
    backend = make_backend("cuda", device=1)
    for type in (GGMLType.Q8_0, GGMLType.F32):
        raw = random_blocks(rng, type, (1, 50, 96))
        w, exact = backend.weight(RawWeight("w", type, raw, 96)), dequantize(raw[0], type).astype(np.float64)
        # By dot products, on matrix units, by cuBLAS.
        for n_tokens in (1, 9, 45):
            x = rng.standard_normal((n_tokens, 96)).astype(np.float32)
            seen = rounded_to_int8(x) if type == GGMLType.Q8_0 and n_tokens < 9 else x.astype(np.float64)
            y = backend.to_host(backend.linear(backend.asarray(x), w))
            assert nmse(y, seen @ exact.T) < (4e-12 if n_tokens == 1 or type == GGMLType.F32 else 4e-7)


@needs_compiler
@pytest.mark.parametrize("name", ["llama-moe", "gemma3-dense"])
def test_golden_logits_through_the_cupy_device(install, name):
    install()
    reference = np.load(shared("golden", f"{name}.npz"))
    results = run_on(
        shared("golden", f"{name}.gguf"), reference["tokens"].tolist(), [1.0] * 2, 11, make=lambda: make_backend("cuda")
    )
    assert nmse(results[0], reference["logits"]) <= 1e-6


@needs_compiler
def test_steps_are_recorded_through_the_cupy_device(install, monkeypatch):
    """In memory of their own: the stand-in has none to give while it records, and spoils what is given out again."""
    install()
    reference = np.load(shared("golden", "llama-moe.npz"))
    path, tokens, runs = shared("golden", "llama-moe.gguf"), reference["tokens"].tolist(), []
    forward = mpillama.runner.forward
    monkeypatch.setattr("mpillama.runner.forward", lambda *args: runs.append(1) or forward(*args))
    result = run_on(path, tokens, [1.0], 1, make=lambda: make_backend("cuda"))[0]
    assert nmse(result, reference["logits"]) <= 1e-6
    assert len(runs) == 3  # once as usual, twice to be recorded


@needs_compiler
def test_graphs_share_memory_and_keep_what_they_need(install, monkeypatch, tmp_path, rng):
    """Shapes of steps in turn, each with a graph: what one leaves lying about another may overwrite."""
    install()
    monkeypatch.setattr("test_gpu_steps.gpu_backend", lambda: make_backend("cuda"))
    path = test_gpu_steps.model(tmp_path, rng, False, [GGMLType.Q4_0])
    batches = test_gpu_steps.schedule(rng, 96, 40, test_gpu_steps.N_BLOCKS, 40)

    def main(world):
        plain, recorded = (test_gpu_steps.open_on(world, path, graphs=graphs) for graphs in (False, True))
        for batch in batches:
            np.testing.assert_array_equal(recorded.run(batch), plain.run(batch))

    run_threads(1, main)


@pytest.mark.parametrize(
    ("arch", "has"),
    [(b"gfx90a:sramecc+:xnack-", True), (b"gfx942", True), (b"gfx906:sramecc+:xnack-", False), (b"gfx1100", False)],
)
def test_amd_gpus_with_matrix_units(install, arch, has):
    install(hip=True, arch=arch)
    assert CupyDevice("hip").matrix_units is has


def test_what_is_missing_is_said_in_one_line(install, monkeypatch):
    def said(kind="cuda"):
        with pytest.raises(UserError) as caught:
            CupyDevice(kind)
        return str(caught.value)

    install(error="cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
    assert said().startswith("there is no usable GPU here (cudaErrorInsufficientDriver): run on a GPU node")
    install(n_gpus=0)
    assert said().startswith("no GPU is visible to this process")
    install(hip=True)
    assert "the installed CuPy is the one for ROCm" in said()
    install()
    assert "the installed CuPy is the one for CUDA" in said("hip")
    with pytest.raises(UserError, match="GPU 2 was chosen, but this process sees 2"):
        CupyDevice("cuda", 2)
    assert [(gpu.index, gpu.name, gpu.total) for gpu in list_gpus("cuda")] == [
        (0, "Fake GPU", 16 << 30),
        (1, "Fake GPU", 16 << 30),
    ]
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(UsageError, match=r"needs CuPy: pip install 'mpillama\[cuda12\]' \(or 'mpillama\[cuda13\]'"):
        CupyDevice("cuda")
    with pytest.raises(UsageError, match=r"needs CuPy: pip install 'mpillama\[rocm\]'"):
        CupyDevice("hip")


def test_failures_of_the_compiler():
    def said(text, kind="cuda"):
        return str(compile_failure(kind, "matmul.cu", RuntimeError(text)))

    assert "pip install nvidia-cuda-runtime" in said("Failed to find CUDA headers")
    assert "pip install nvidia-cuda-nvrtc" in said("libnvrtc.so.13: cannot open shared object file")
    assert "load ROCm's module" in said("[Errno 2] No such file or directory: 'hipcc'", "hip")
    assert said("k.cu(3): error: expected a ;").startswith("matmul.cu could not be compiled for this GPU (k.cu(3)")


def test_importing_the_program_does_not_import_cupy():
    code = "import sys, mpillama.cli.main, mpillama.backends.gpu; sys.exit('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ranks_of_a_host_take_its_gpus_in_turn(install):
    install(n_gpus=3)
    assert choose_gpu([GpuWish("cuda")], SoloWorld(), share=False)[0] == 0

    def chosen(*wishes, share=False):
        found = run_threads(len(wishes), lambda world: choose_gpu([GpuWish(*wish) for wish in wishes], world, share))
        return [index for index, _ in found]

    any_gpu, none = ("cuda",), ()
    assert chosen(*[any_gpu] * 3) == [0, 1, 2]
    assert chosen(*[any_gpu] * 4, share=True) == [0, 1, 2, 0]
    assert chosen(none, any_gpu, none, none, any_gpu) == [0, 0, 0, 0, 1]
    assert chosen(("cuda", 2), none, ("cuda", 0)) == [2, 0, 0]
    for wishes, sharers in (([any_gpu] * 4, "0 and 3"), ([none, ("cuda", 1), ("cuda", 1)], "1 and 2")):
        with pytest.raises(UsageError, match=f"ranks {sharers} would share a GPU of threads"):
            chosen(*wishes)


def test_a_gpu_that_is_not_visible_is_named(install):
    install(n_gpus=2)

    def failed(world):
        with pytest.raises(PeerFailure if world.rank != 1 else UserError) as caught:
            choose_gpu([GpuWish("cuda", 0), GpuWish("cuda", 2), GpuWish()], world, share=False)
        assert world.rank != 1 or caught.value.line.startswith("cuda:2 is not visible, there are cuda:0 to cuda:1; see")

    run_threads(3, failed)


def test_a_rank_without_gpu_ends_all(install):
    install(n_gpus=0)

    def failed(world):
        with pytest.raises(UserError if world.rank == 0 else PeerFailure):
            choose_gpu([GpuWish("cuda")] * 3, world, share=False)

    run_threads(3, failed)


def test_a_model_that_does_not_fit_a_gpu_is_refused(install):
    install()
    backend = make_backend("cuda")
    assert backend.free_memory() == 8 << 30
    with pytest.raises(UserError, match=r"^the GPU of rank 0 on \S+ has 8\.00 GiB free, but it needs .*use more GPUs"):
        fit_memory(SoloWorld(), [20 << 30], [1 << 20], 4096, 4096, backend.free_memory())
    with pytest.raises(UserError, match=r"the largest context that fits is -c \d+$"):
        fit_memory(SoloWorld(), [4 << 30], [20 << 30], 1 << 20, 1 << 20, backend.free_memory())
    assert fit_memory(SoloWorld(), [4 << 30], [1 << 30], 4096, 4096, backend.free_memory()) == 4096
    assert 4096 <= fit_memory(SoloWorld(), [4 << 30], [20 << 30], 1 << 20, 4096, backend.free_memory()) < 1 << 18


@pytest.mark.parametrize("script", ["run_gpu.py", "measure_gpu.py"])
def test_scripts_for_gpus_say_that_there_is_none(script):
    path = Path(__file__).parents[1] / script
    if not run_gpu.no_gpu("cuda"):
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == run_gpu.NO_GPU
    assert re.fullmatch(
        r"(test-gpu|measure_gpu): (there is no NVIDIA GPU here|the NVIDIA driver is here).*\n", done.stderr
    )
    assert not done.stdout
