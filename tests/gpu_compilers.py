"""The kernels through the compilers of real GPUs, which need no GPU: NVRTC, hipRTC and clang.

``make compilers`` fetches them; ``python tests/gpu_compilers.py`` compiles every kernel for every GPU that they
know and prints registers and spills.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from mpillama.backends.gpu.attention import attention_unit, tiles_unit
from mpillama.backends.gpu.device import Unit
from mpillama.backends.gpu.elementwise import TOP_K
from mpillama.backends.gpu.matmul import unit_of
from mpillama.backends.gpu.source import assemble
from mpillama.backends.kv_codec import CACHE_TYPES
from mpillama.backends.quants import SUPPORTED
from mpillama.gguf.types import GGMLType

ROOT = Path(__file__).parents[1]
COMPILERS = ROOT / ".compilers"
CUDA = ("75", "80", "86", "89", "90", "100", "120")
# hipRTC of Debian 12 aborts on those that it does not know; clang 19 knows the rest, but for the newest.
HIPRTC = ("gfx906", "gfx90a", "gfx1030")
CLANG = ("gfx942", "gfx1100", "gfx1201")
NEWEST = ("gfx950",)
HEADS = (64, 80, 96, 128, 192, 256)
PLAIN = (Unit("elementwise.cu"), Unit("experts.cu"), TOP_K)


def warp_of(arch: str) -> int:
    """Lanes of a warp: 64 on GCN and CDNA."""
    return 64 if arch.startswith("gfx9") else 32


def has_tiles(arch: str) -> bool:
    """Whether a GPU has the matrix units that attention_mma.cu is made for."""
    return arch.isdigit() and int(arch) >= 80


def units(arch: str) -> Iterator[Unit]:
    """Return everything that can be compiled for one GPU."""
    yield from PLAIN
    yield from map(unit_of, sorted(SUPPORTED))
    for k in CACHE_TYPES.values():
        for n_v in (64, 128, 256):
            yield attention_unit(k, k, n_v, warp_of(arch))
        for n in HEADS if has_tiles(arch) else ():
            tiles = tiles_unit(k, k, n, n)
            # Quantized caches have blocks of 32.
            if tiles is not None and (n % 32 == 0 or k in (GGMLType.F16, GGMLType.BF16)):
                yield tiles


def some_units(arch: str, rng: np.random.Generator) -> Iterator[Unit]:
    """Return every kernel once, for types that are chosen at random."""
    yield from PLAIN
    types = sorted(SUPPORTED)
    yield unit_of(types[rng.integers(len(types))])
    k, v = (CACHE_TYPES[str(name)] for name in rng.choice(list(CACHE_TYPES), 2))
    yield attention_unit(k, v, int(rng.choice([64, 128, 256])), warp_of(arch))
    if has_tiles(arch):
        k, v = (CACHE_TYPES[str(name)] for name in rng.choice([name for name in CACHE_TYPES if name != "f32"], 2))
        n = int(rng.choice([n for n in HEADS if n % 32 == 0]))
        tiles = tiles_unit(k, v, n, n)
        assert tiles is not None
        yield tiles


@lru_cache
def find_nvrtc() -> Path | None:
    """Return NVRTC's library, of `make compilers`, of this Python, or of the system."""
    places = [COMPILERS, Path(sysconfig.get_path("purelib")), Path("/usr/local/cuda")]
    patterns = ("nvidia/*/lib/libnvrtc.so.*", "lib64/libnvrtc.so.*", "**/libnvrtc.so.1[0-9]")
    for place in places:
        for pattern in patterns[: 2 if place != COMPILERS else 3]:
            found = [path for path in sorted(place.glob(pattern)) if re.fullmatch(r"libnvrtc\.so\.\d+", path.name)]
            if found:
                return found[-1]
    return None


@lru_cache
def find_hiprtc() -> str | None:
    """Return hipRTC's library."""
    for name in ("libhiprtc.so", "libamdhip64.so.5"):
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        if hasattr(library, "hiprtcCompileProgram"):
            return name
    return None


def find_clang(arch: str = CLANG[0]) -> list[str] | None:
    """Return the command of a clang that knows this AMD GPU, if HIP's headers are there too.

    For the newest ones it is the one within Zig, which `make compilers` fetches, with the headers of Debian's.
    """
    found = next((path for n in (21, 20, 19) if (path := shutil.which(f"clang-{n}"))), None)
    if not found or not Path("/usr/include/hip/hip_runtime.h").exists():
        return None
    zig = COMPILERS / "ziglang" / "zig"
    if arch not in NEWEST:
        return [found]
    if not zig.exists():
        return None
    headers = subprocess.run([found, "-print-resource-dir"], capture_output=True, text=True, check=True).stdout.strip()
    # HIP 5.2's headers take it from the compiler, which no longer says it.
    return [str(zig), "clang", "-resource-dir", headers, f"-D__AMDGCN_WAVEFRONT_SIZE={warp_of(arch)}"]


def _rtc(library: ctypes.CDLL, prefix: str, text: str, options: list[str]) -> tuple[bool, str]:
    """Compile by a run-time compiler's functions, which both vendors call alike."""
    program = ctypes.c_void_p()
    library[f"{prefix}CreateProgram"](ctypes.byref(program), text.encode(), b"kernel.cu", 0, None, None)
    values = (ctypes.c_char_p * len(options))(*[option.encode() for option in options])
    status = library[f"{prefix}CompileProgram"](program, len(options), values)
    size = ctypes.c_size_t()
    library[f"{prefix}GetProgramLogSize"](program, ctypes.byref(size))
    log = ctypes.create_string_buffer(max(1, size.value))
    library[f"{prefix}GetProgramLog"](program, log)
    library[f"{prefix}DestroyProgram"](ctypes.byref(program))
    return status == 0, log.value.decode(errors="replace")


def nvrtc(unit: Unit, arch: str) -> tuple[bool, str]:
    """Compile with the options that CuPy's RawModule gives; returns success and the log."""
    options = ["-std=c++17", f"-arch=sm_{arch}", "-ftz=true", "--device-as-default-execution-space", "-w"]
    options += ["--ptxas-options=-v"]
    library = find_nvrtc()
    assert library is not None
    return _rtc(ctypes.CDLL(str(library)), "nvrtc", assemble(unit, warp_of(arch)), options)


def hiprtc(unit: Unit, arch: str) -> tuple[bool, str]:
    """Compile in a process of its own: hipRTC aborts on what it does not know."""
    done = subprocess.run(
        [sys.executable, __file__, "--hiprtc", arch, unit.file, *(f"{name}={value}" for name, value in unit.defines)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
    )
    return done.returncode == 0, done.stdout + done.stderr


def clang(unit: Unit, arch: str) -> tuple[bool, str]:
    """Compile to assembly; returns success, and what the compiler says of each kernel."""
    compiler = find_clang(arch)
    assert compiler is not None
    flags = [
        "-x",
        "hip",
        f"--offload-arch={arch}",
        "--offload-device-only",
        "-nogpulib",
        "-O3",
        "-std=c++17",
        "-S",
        "-w",
    ]
    flags += ["--rocm-path=/usr", "-include", "hip/hip_runtime.h", "-Rpass-analysis=kernel-resource-usage"]
    command = [*compiler, *flags, "-", "-o", "/dev/null"]
    done = subprocess.run(command, input=assemble(unit, warp_of(arch)), capture_output=True, text=True)
    return done.returncode == 0, done.stderr


def resources(log: str) -> dict[str, tuple[int, int]]:
    """Return registers and bytes of spills of each kernel, from the log of NVRTC or of clang."""
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, stores, loads, registers in re.findall(pattern, log, re.DOTALL):
        found[name] = int(registers), int(stores) + int(loads)
    # Newer clangs say how many registers there are in the assembly only.
    pattern = r"Function Name: (\w+).*?VGPRs: (\d+|[\w.]+).*?ScratchSize \[bytes/lane\]: (\d+)"
    for name, registers, scratch in re.findall(pattern, log, re.DOTALL):
        found[name] = int(registers) if registers.isdigit() else 1, int(scratch)
    return found


def main() -> int:
    """Compile everything and print a table."""
    if sys.argv[1:2] == ["--hiprtc"]:
        arch, file, *defines = sys.argv[2:]
        unit = Unit(file, tuple((name, int(value)) for name, value in (define.split("=") for define in defines)))
        options = [f"--offload-arch={arch}", "-O3", "-std=c++17"]
        ok, log = _rtc(ctypes.CDLL(str(find_hiprtc())), "hiprtc", assemble(unit, warp_of(arch)), options)
        print(log)
        return not ok
    failed = 0
    for found, compile_for, archs in (
        (find_nvrtc(), nvrtc, CUDA),
        (find_hiprtc(), hiprtc, HIPRTC),
        (find_clang(), clang, CLANG),
        (find_clang(NEWEST[0]), clang, NEWEST),
    ):
        for arch in archs if found else ():
            for unit in units(arch):
                ok, log = compile_for(unit, arch)
                failed += not ok
                spills = {name: use for name, use in resources(log).items() if use[1]}
                most = max((use[0] for use in resources(log).values()), default=0)
                title = " ".join([compile_for.__name__, arch, unit.file, *(f"{n}={v}" for n, v in unit.defines)])
                print(title, "ok" if ok else f"FAILED\n{log[:2000]}", f"registers <= {most}", spills or "", flush=True)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
