"""Everything about GPUs that only a GPU can show: `make test-gpu`, on a machine that has one.

    python tests/run_gpu.py [--only kernels,ranks,memcheck,racecheck] [--backend cuda] [pytest arguments]

kernels: every op, weight type and architecture on the GPU, against float64 and llama.cpp's logits, and recorded steps
ranks: two ranks give the logits of one, over NCCL; on one GPU too (NCCL 2.30.3 and newer)
memcheck, racecheck: some of the first under compute-sanitizer, where it is installed

``python tests/run_gpu.py --extra`` prints which of mpillama's extras this machine's driver needs, with nothing but the
standard library. The exit code is 0 if all went well, 1 if something failed, and 3 if there is no GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NO_GPU = 3
ROOT = Path(__file__).resolve().parent.parent
UNIT = ROOT / "tests" / "unit"
STAGES = ("kernels", "ranks", "memcheck", "racecheck")
KERNELS = (
    "test_backend_contract.py",
    "test_gpu_matmul.py",
    "test_gpu_matmul_mma.py",
    "test_gpu_attention.py",
    "test_gpu_attention_mma.py",
    "test_gpu_golden.py",
    "test_gpu_steps.py",
)
# Under a tool that watches each access, what reaches every kernel.
WATCHED = " or ".join(
    (
        "token_by_token and moe",
        "quantized_model and f16",
        "splits_warps and 32-0",
        "many_tokens",
        "share_the_columns",
        "same_bits and False",
    )
)


def no_gpu(backend: str) -> str:
    """Return why no GPU can be used here, or nothing."""
    library, count = (
        ("libcuda.so.1", "cuDeviceGetCount") if backend == "cuda" else ("libamdhip64.so", "hipGetDeviceCount")
    )
    vendor = "NVIDIA" if backend == "cuda" else "AMD"
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return f"there is no {vendor} GPU here ({library}, a part of its driver, was not found); run this on a GPU node"
    found = ctypes.c_int(0)
    if (backend == "cuda" and driver.cuInit(0)) or driver[count](ctypes.byref(found)) or not found.value:
        return f"the {vendor} driver is here, but shows no GPU; ask the scheduler for one, or see CUDA_VISIBLE_DEVICES"
    return ""


def extra() -> str:
    """Return the extra for this machine's driver and GPU."""
    driver = ctypes.CDLL("libcuda.so.1")
    version, major = ctypes.c_int(0), ctypes.c_int(0)
    driver.cuInit(0)
    driver.cuDriverGetVersion(ctypes.byref(version))
    # Attribute 75 is the first number of the compute capability of device 0; CUDA 13 begins at 7.5, which is Turing.
    minor = ctypes.c_int(0)
    driver.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    return "cuda13" if version.value >= 13000 and (major.value, minor.value) >= (7, 5) else "cuda12"


def pytest_on(backend: str, arguments: list[str], prefix: tuple[str, ...] = (), **env: str) -> int:
    """Run tests on the GPU; returns the exit code."""
    tests = [str(UNIT / name) for name in KERNELS]
    command = [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *arguments]
    return subprocess.run(command, cwd=ROOT, env=os.environ | {"MPILLAMA_TEST_GPU": backend, **env}).returncode


def kernels(backend: str, arguments: list[str]) -> int:
    """Run the suite on the GPU."""
    # The other backends are no matter of the GPU.
    return pytest_on(backend, ["-k", f"not reference and not cpu- and not {_others(backend)}", *arguments])


def _others(backend: str) -> str:
    return "hip-" if backend == "cuda" else "cuda-"


def logits(backend: str, n_ranks: int, out: Path, **env: str) -> None:
    """Save the logits of the demo model: a prompt in pieces of one, so that steps are recorded.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    launcher = Path(sys.executable).with_name("mpirun")
    mpirun = str(launcher) if launcher.exists() else shutil.which("mpirun")
    if n_ranks > 1 and mpirun is None:
        raise FileNotFoundError("there is no mpirun; pip install mpich provides one")
    tokens = ",".join(str(1 + 37 * i % 1000) for i in range(40))
    command = [] if n_ranks == 1 else [str(mpirun), "-n", str(n_ranks)]
    command += [sys.executable, "-m", "mpillama", "logits", "--backend", backend, "--tokens", tokens, "-ub", "1"]
    subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True, timeout=300, env=os.environ | env)


def ranks(backend: str) -> int:
    """Compare two ranks with one, over NCCL and by way of the host, with and without graphs."""
    import numpy as np

    shared = {"MPILLAMA_SHARE_GPUS": "1", "NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4", "NCCL_DEBUG": "WARN"}
    ways = {
        "one rank": (1, {}),
        "one rank, no graphs": (1, {"MPILLAMA_GRAPHS": "0"}),
        "two ranks, NCCL": (2, shared),
        "two ranks, NCCL, no graphs": (2, shared | {"MPILLAMA_GRAPHS": "0"}),
        "two ranks, host": (2, shared | {"MPILLAMA_COLLECTIVES": "host"}),
    }
    found, failed = {}, 0
    with tempfile.TemporaryDirectory() as folder:
        for name, (n_ranks, env) in ways.items():
            out = Path(folder) / "logits.npy"
            try:
                logits(backend, n_ranks, out, **env)
                found[name] = np.load(out).astype(np.float64)
            except (subprocess.SubprocessError, OSError) as error:
                print(f"{name}: FAILED: {error}", flush=True)
                failed = 1
                continue
            base = next(iter(found.values()))
            error = float(((found[name] - base) ** 2).sum() / (base**2).sum())
            wrong = error > (0.0 if n_ranks == 1 else 2e-3)
            failed |= wrong
            print(f"{name}: squared error relative to one rank {error:.2g}{' FAILED' if wrong else ''}", flush=True)
    return failed


def sanitize(backend: str, tool: str, arguments: list[str]) -> int:
    """Run some tests under compute-sanitizer; returns the exit code, 0 where there is none."""
    name = shutil.which("compute-sanitizer") or next(
        (str(path) for path in sorted(Path("/usr/local").glob("cuda*/bin/compute-sanitizer"))), None
    )
    if backend != "cuda" or name is None:
        print(f"{tool}: skipped, compute-sanitizer is not on PATH (it comes with the CUDA toolkit)", flush=True)
        return 0
    prefix = (name, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all", "--print-limit", "20")
    return pytest_on(backend, ["-k", WATCHED, *arguments], prefix, MPILLAMA_TEST_GPU_POOL="0")


def main() -> int:
    """Run what was asked for and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--extra", action="store_true", help="print the extra that this machine needs, and end")
    parser.add_argument("--backend", choices=("cuda", "hip"), default="cuda")
    parser.add_argument("--only", default=",".join(STAGES), metavar="STAGE,...", help=f"of {', '.join(STAGES)}")
    args, more = parser.parse_known_args()
    stages = args.only.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"there is no stage {unknown[0]}; choose of {', '.join(STAGES)}")
    if problem := no_gpu(args.backend):
        print(f"test-gpu: {problem}", file=sys.stderr)
        return NO_GPU
    if args.extra:
        print(extra())
        return 0
    results = {}
    for stage in stages:
        print(f"--- {stage}", flush=True)
        began = time.monotonic()
        if stage == "ranks":
            code = ranks(args.backend)
        else:
            code = kernels(args.backend, more) if stage == "kernels" else sanitize(args.backend, stage, more)
        results[stage] = code, time.monotonic() - began
    for stage, (code, seconds) in results.items():
        print(f"{stage}: {'ok' if code == 0 else f'FAILED (exit code {code})'}, {seconds:.0f} s")
    return int(any(code for code, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
