"""`CupyDevice` on CuPy itself, for CUDA and ROCm, on a device that does its work as late as it may."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from mpillama.backends import make_backend
from mpillama.backends.base import RawWeight
from mpillama.backends.gpu import cupy_device
from mpillama.backends.gpu.cupy_device import CupyDevice
from mpillama.backends.gpu.driver import identify, list_gpus, load_cupy
from mpillama.backends.quants import dequantize
from mpillama.errors import UserError
from mpillama.gguf.types import GGMLType
from tiny import nmse, random_blocks

KIND = os.environ.get("MPILLAMA_TEST_GPU", "")


@pytest.fixture(autouse=True)
def two_devices(monkeypatch):
    monkeypatch.setenv("EMULATED_GPUS", "2")


def product(backend, rng, n_tokens=3):
    """Return the error of a product of random weights."""
    raw = random_blocks(rng, GGMLType.F32, (1, 50, 96))
    w, exact = backend.weight(RawWeight("w", GGMLType.F32, raw, 96)), dequantize(raw[0], GGMLType.F32)
    x = rng.standard_normal((n_tokens, 96)).astype(np.float32)
    return nmse(backend.to_host(backend.linear(backend.asarray(x), w)), x.astype(np.float64) @ exact.T)


@pytest.mark.parametrize(
    ("arch", "warp", "matrix_units", "library"),
    [
        ("gfx90a:sramecc+:xnack-", 64, True, True),
        ("gfx906:sramecc+:xnack-", 64, False, False),
        ("gfx1030", 32, False, True),
    ],
)
@pytest.mark.skipif(KIND != "hip", reason="about AMD's GPUs")
def test_what_an_amd_gpu_is_like(arch, warp, matrix_units, library, monkeypatch):
    monkeypatch.setenv("EMULATED_ARCH", arch)
    device = CupyDevice(KIND, 1)
    assert (device.warp, device.n_cores, device.matrix_units) == (warp, 4, matrix_units)
    assert bool(device.gemm_tokens) is library
    assert arch.split(":")[0] in device.model
    assert device.model != CupyDevice(KIND, 0).model


@pytest.mark.skipif(KIND != "cuda", reason="about NVIDIA's GPUs")
def test_what_an_nvidia_gpu_is_like():
    device = CupyDevice("cuda", 1)
    assert (device.warp, device.n_cores, device.matrix_units, device.async_copies) == (32, 4, True, True)
    assert device.can_capture
    assert "sm_90" in device.model
    assert [gpu.name for gpu in list_gpus("cuda")] == ["Emulated H200", "Emulated H201"]
    assert len({identify(load_cupy("cuda"), index) for index in (0, 1)}) == 2


def test_host_arrays_may_change_after_an_upload(rng, monkeypatch):
    """Small ones, and those of several pieces; pinned ones too, as downloads are."""
    monkeypatch.setattr(cupy_device, "_PIECE", 1000)
    device = CupyDevice(KIND)
    for size in (1, 240, 250, 251, 2000):
        x = rng.standard_normal(size).astype(np.float32)
        pinned = device.download(device.upload(x))
        arrays = []
        for source in (x.copy(), pinned):
            arrays.append(device.upload(source))
            source[:] = -1
        device.write(arrays[0], x)
        for array in arrays:
            np.testing.assert_array_equal(device.download(array), x)


def test_several_devices_in_turn_and_in_threads(rng):
    backends = [make_backend(KIND, device=index) for index in (0, 1, 0)]
    errors = [product(backend, rng) for backend in (*backends, *backends[::-1])]
    with ThreadPoolExecutor(3) as threads:
        seeds = rng.integers(1 << 30, size=12)
        errors += threads.map(lambda i: product(backends[i % 3], np.random.default_rng(seeds[i])), range(3))
        for backend in backends:
            errors.append(threads.submit(product, backend, rng).result())
    assert max(errors) < 1e-12


def test_products_of_the_library(rng, monkeypatch):
    backend = make_backend(KIND)
    monkeypatch.setattr(backend.device, "gemm_tokens", 20)
    assert product(backend, rng, 25) < 1e-12


def test_a_copy_within_the_device(rng):
    device = CupyDevice(KIND)
    x = rng.standard_normal((5, 7)).astype(np.float32)
    source, target = device.upload(x), device.empty((5, 7))
    device.copy(target, source)
    device.write(source, np.zeros((5, 7)))
    np.testing.assert_array_equal(device.download(target), x)


def test_graphs_get_the_memory_that_others_have_left(monkeypatch):
    free = CupyDevice(KIND).free_memory()
    monkeypatch.setenv("EMULATED_MEMORY", str((4 << 30) - free + (30 << 20)))
    device = CupyDevice(KIND)
    large = device.empty((20 << 20,), np.uint8)
    del large
    with device.graph_memory():
        assert device.empty((15 << 20,), np.uint8).size == 15 << 20
    with pytest.raises(UserError, match=r"GPU 0 is out of memory \(0\.0 of .* GB are free\): use more ranks"):
        device.empty((40 << 20,), np.uint8)


def test_a_kernel_that_does_not_compile_is_named(monkeypatch):
    backend = make_backend(KIND)
    x = backend.asarray(np.ones(3))
    monkeypatch.setattr(cupy_device, "assemble", lambda unit, warp: "extern this is no kernel")
    with pytest.raises(UserError, match=r"elementwise\.cu could not be compiled for this GPU \(.*error"):
        backend.add(x, x)
