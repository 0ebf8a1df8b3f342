"""Every kernel through the compilers of real GPUs, where they are installed (``make compilers``)."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest

import gpu_compilers as compilers
from mpillama.backends.gpu.source import assemble

BIG = {"attend_1", "attend_2", "attend_4", "attend_8"}


def check(compile_for, arch, rng):
    units = list(compilers.some_units(arch, rng))
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        results = list(pool.map(lambda unit: compile_for(unit, arch), units))
    for unit, (ok, log) in zip(units, results, strict=True):
        assert ok, (unit, log[:4000])
        for name, (registers, spilled) in compilers.resources(log).items():
            # The query rows of attention are meant to fill the registers; a few words beside them do no harm. Written
            # and read bytes together are 108 at most, over all types and sizes (sm_120, f32 keys).
            assert spilled <= (128 if name in BIG else 0) or registers == 0, (unit, name, registers, spilled)


@pytest.mark.parametrize("arch", compilers.CUDA)
def test_nvrtc(arch, rng):
    if compilers.find_nvrtc() is None:
        pytest.skip("NVRTC is not installed; make compilers fetches it")
    check(compilers.nvrtc, arch, rng)


@pytest.mark.parametrize("arch", compilers.HIPRTC)
def test_hiprtc(arch, rng):
    if compilers.find_hiprtc() is None:
        pytest.skip("hipRTC is not installed (Debian: apt install hipcc)")
    check(compilers.hiprtc, arch, rng)


@pytest.mark.parametrize("arch", compilers.CLANG)
def test_clang(arch, rng):
    if compilers.find_clang() is None:
        pytest.skip("clang 19 with HIP's headers is not installed (Debian: apt install clang-19 hipcc)")
    check(compilers.clang, arch, rng)


@pytest.mark.parametrize("arch", compilers.NEWEST)
def test_the_newest_gpus(arch, rng):
    if compilers.find_clang(arch) is None:
        pytest.skip(f"no clang that knows {arch} is installed; make compilers fetches one")
    check(compilers.clang, arch, rng)


def test_real_gpus_get_no_trace_of_the_emulator():
    for unit in compilers.units("90"):
        text = assemble(unit, 32)
        assert "#include <" not in text
        assert "setjmp" not in text
