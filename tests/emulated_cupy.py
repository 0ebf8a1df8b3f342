"""CuPy on a machine without a GPU: itself as it is, on libraries that run on the CPU (cupy/hip.cpp, cupy/cuda.cpp).

    python tests/emulated_cupy.py --fetch
    python tests/emulated_cupy.py cuda|hip ARGUMENT ...

runs this interpreter with these arguments, in an environment that looks like a node with GPUs: EMULATED_GPUS of them
(default 1), each with EMULATED_MEMORY bytes (4 GiB), for hip of architecture EMULATED_ARCH (gfx90a). CuPy comes into
``.cupy``, and what it asks for is built into ``build/cupy``. Its wheels for CUDA hold a part of CUDA that wants a true
driver, within the module that calls it: that one is built anew from CuPy's source.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, FETCHED, BUILT = ROOT / "tests" / "cupy", ROOT / ".cupy", ROOT / "build" / "cupy"
KERNELS = ROOT / "mpillama" / "backends" / "gpu" / "kernels"
VERSION = "14.2.0"
WHEELS = {
    "hip": (f"cupy-rocm-7-0=={VERSION}",),
    "cuda": (
        f"cupy-cuda13x=={VERSION}",
        "cuda-pathfinder>=1.3.4",
        "nvidia-cuda-runtime==13.0.*",
        "nvidia-cuda-crt==13.0.*",
    ),
    # The Cython that the wheels were made with.
    "tools": ("cython==3.2.4",),
}
# Libraries that CuPy is linked to or looks for; what it asks of them: a version, if there is one, and a name.
_LIBRARY = {
    "hip": re.compile(r"NEEDED\s+(lib(?:roc|hip|amdhip|rccl)\w*\.so\.\d+)"),
    "cuda": re.compile(r"NEEDED\s+(lib(?:cu|nv|nccl)\w*\.so\.\d+)"),
}
_MORE = {
    "hip": {"libhiprtc.so.7", "libamdhip64.so"},
    "cuda": {"libcuda.so.1", "libcudart.so.13", "libnvrtc.so.13", "libcublasLt.so.13"},
}
_WANTED = re.compile(
    r"\*UND\*\s+\w+\s+(?:Base\s+|\(?([A-Za-z]\w+\.[\w.]+)\)?\s+)?((?:__)?(?:hip|roc|nccl|cu|nvrtc)\w+)$", re.MULTILINE
)
_OWN = re.compile(r"^[\w:* ]+?\b((?:hip|nccl|cu|nvrtc)\w+)\(|\b(cudaGetDeviceProperties)\(", re.MULTILINE)


def fetch() -> None:
    """Bring CuPy's wheels and source into ``.cupy``.

    Raises:
        subprocess.CalledProcessError: pip fails.
    """
    if (FETCHED / VERSION).exists():
        return
    shutil.rmtree(FETCHED, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for kind, wheels in WHEELS.items():
        subprocess.run([*pip, "install", "--no-deps", "--target", str(FETCHED / kind), *wheels], check=True)
    # Its setup looks for no CUDA then.
    env = os.environ | {"CUPY_INSTALL_USE_STUB": "1"}
    download = ["download", "--no-deps", "--no-binary", "cupy", "--dest", str(FETCHED), f"cupy=={VERSION}"]
    subprocess.run([*pip, *download], check=True, env=env)
    with tarfile.open(FETCHED / f"cupy-{VERSION}.tar.gz") as archive:
        archive.extractall(FETCHED)
    (FETCHED / VERSION).touch()


def build(kind: str) -> None:
    """Make one library with all names by which CuPy looks for others; for ROCm, a hipcc that says where headers are.

    Raises:
        subprocess.CalledProcessError: a compiler fails.
    """
    folder, texts = BUILT / kind, [*SOURCE.glob("*.h"), *SOURCE.glob("*.cpp")]
    library = folder / "library.so"
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in [*texts, Path(__file__)]):
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wheel = FETCHED / kind
    if kind == "cuda":
        _build_runtime(folder)
    names, wanted = set(_MORE[kind]), {}
    for path in wheel.glob("cupy*/**/*.so"):
        text = subprocess.run(["objdump", "-pT", path], capture_output=True, text=True, check=True).stdout
        names |= set(_LIBRARY[kind].findall(text))
        wanted |= {name: version for version, name in _WANTED.findall(text)}
    found = _OWN.findall("".join(path.read_text() for path in texts))
    # What nothing here needs fails when it is called.
    missing = wanted.keys() - {a or b for a, b in found}
    (folder / "missing.c").write_text("".join(f"int {name}() {{ return 999; }}\n" for name in sorted(missing)))
    versions: dict[str, list[str]] = {}
    for name, version in wanted.items():
        if version:
            versions.setdefault(version, []).append(name)
    script = "".join(f"{version} {{ {'; '.join(sorted(own))}; }};\n" for version, own in sorted(versions.items()))
    (folder / "versions").write_text(script)
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"]
    objects = ["missing.o", "-Wl,--version-script=versions", "-ldl", "-lrt", "-o", "new.so"]
    subprocess.run(["gcc", "-c", "-w", "-fPIC", "missing.c"], cwd=folder, check=True)
    sources = [SOURCE / "hip.cpp"]
    if kind == "cuda":
        # It includes the other.
        sources = [SOURCE / "cuda.cpp", SOURCE / "cuda_properties.cpp"]
        flags.append(f"-I{wheel / 'nvidia' / 'cu13' / 'include'}")
    subprocess.run(["g++", *flags, *map(str, sources), *objects], cwd=folder, check=True)
    for name in names:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(library.name)
    said = r"#include <...> search starts here:\n /usr/include\nEnd of search list.\n"
    (folder / "hipcc").write_text(f"#!/bin/sh\nprintf '{said}' >&2\n")
    (folder / "hipcc").chmod(0o755)
    # Last: it is what tells that all is there.
    (folder / "new.so").rename(library)


def _build_runtime(folder: Path) -> None:
    """Put a module in the place of `cupy_backends.cuda.api.runtime` that finds CUDA's run time like other libraries."""
    source, headers = FETCHED / f"cupy-{VERSION}", FETCHED / "cuda" / "nvidia" / "cu13" / "include"
    # The wheels of headers lack this one.
    (folder / "cuda_profiler_api.h").write_text(
        "#pragma once\n#include <cuda_runtime_api.h>\n"
        'extern "C" cudaError_t cudaProfilerStart(void);\nextern "C" cudaError_t cudaProfilerStop(void);\n'
    )
    constants = {"CUPY_USE_CUDA_PYTHON": False, "CUPY_CUFFT_STATIC": False, "CUPY_CYTHON_VERSION": "3.2.4"}
    constants |= {"CUPY_CUDA_VERSION": 13000, "CUPY_HIP_VERSION": 0}
    directives = {"language_level": 3, "binding": False, "embedsignature": True, "c_api_binop_methods": True}
    directives |= {"freethreading_compatible": True}
    code = (
        "from Cython.Compiler.Main import compile, CompilationOptions\n"
        f"options = CompilationOptions(cplus=True, include_path=['.'], compile_time_env={constants!r},\n"
        f"    compiler_directives={directives!r}, output_file={str(folder / 'runtime.cpp')!r})\n"
        "raise SystemExit(compile('cupy_backends/cuda/api/runtime.pyx', options).num_errors)\n"
    )
    env = os.environ | {"PYTHONPATH": str(FETCHED / "tools")}
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, env=env, check=True, stderr=subprocess.DEVNULL
    )
    includes = [source, source / "cupy_backends" / "cuda" / "api", headers, folder, sysconfig.get_path("include")]
    flags = ["-std=c++17", "-O1", "-w", "-fPIC", "-shared", *(f"-I{path}" for path in includes)]
    (module,) = (FETCHED / "cuda" / "cupy_backends" / "cuda" / "api").glob("runtime.*.so")
    # For its name: there is no library yet.
    subprocess.run(["gcc", "-shared", "-x", "c", "/dev/null", "-o", str(folder / "libcudart.so.13")], check=True)
    linked = [f"-L{folder}", "-Wl,--no-as-needed", "-l:libcudart.so.13", "-o", str(module)]
    subprocess.run(["g++", *flags, str(folder / "runtime.cpp"), *linked], check=True)


def environment(kind: str) -> dict[str, str]:
    """Return the variables under which a process finds all that."""
    folder, wheel = BUILT / kind, FETCHED / kind
    lanes = {"EMULATED_ARCH": "gfx1030"} if kind == "cuda" else {}
    return os.environ | {
        "PYTHONPATH": f"{wheel}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "LD_LIBRARY_PATH": str(folder),
        "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}",
        "ROCM_HOME": str(folder),
        "CUDA_PATH": str(wheel / "nvidia" / "cu13"),
        "EMULATED_PRELUDE": str(SOURCE / "prelude.h"),
        "CPLUS_INCLUDE_PATH": str(KERNELS),
        "CUPY_CACHE_DIR": str(folder / "cache"),
        "MPILLAMA_TEST_GPU": kind,
        "MPILLAMA_TEST_GPU_GRAPHS": "1",
        **lanes,
    }


def main() -> int:
    """Fetch and build what is missing, and run the rest of the command line."""
    kind = sys.argv[1] if len(sys.argv) > 1 else ""
    if kind not in ("cuda", "hip", "--fetch"):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        fetch()
        if kind == "--fetch":
            return 0
        build(kind)
    except (subprocess.CalledProcessError, OSError) as error:
        print(f"emulated_cupy: {error}", file=sys.stderr)
        return 1
    return subprocess.run([sys.executable, *sys.argv[2:]], env=environment(kind)).returncode


if __name__ == "__main__":
    sys.exit(main())
