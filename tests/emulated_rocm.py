"""CuPy for ROCm on a machine without ROCm: its wheel as it is, on libraries that run on the CPU (rocm/runtime.cpp).

    python tests/emulated_rocm.py ARGUMENT ...

runs this interpreter with these arguments, in an environment that looks like a node with AMD GPUs. ``make test-rocm``
fetches CuPy into ``.rocm``; the libraries that it asks for are built into ``build/rocm``. ROCM_DEVICES, ROCM_MEMORY and
ROCM_ARCH (default 1, 4 GiB, gfx90a) say what GPUs there are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE, CUPY, FOLDER = ROOT / "tests" / "rocm", ROOT / ".rocm", ROOT / "build" / "rocm"
KERNELS = ROOT / "mpillama" / "backends" / "gpu" / "kernels"
# Of all that CuPy is linked to, what belongs to ROCm; of what it asks of that, the version, if any, and the name.
_LIBRARY = re.compile(r"NEEDED\s+(lib(?:roc|hip|amdhip|rccl)\w*\.so\.\d+)")
_WANTED = re.compile(r"\*UND\*\s+\w+\s+(?:\(?([A-Za-z]\w+\.\w+)\)?\s+)?((?:__)?(?:hip|roc|nccl)\w+)$", re.MULTILINE)
_OWN = re.compile(r"^[\w:* ]+?\b((?:hip|nccl)\w+)\(", re.MULTILINE)


def build() -> None:
    """Make one library with all names by which CuPy looks for ROCm's, and a hipcc that says where headers are.

    Raises:
        subprocess.CalledProcessError: a compiler fails.
        FileNotFoundError: CuPy is not there, or a compiler.
    """
    if not (CUPY / "cupy").exists():
        raise FileNotFoundError("CuPy for ROCm is not in .rocm; make test-rocm fetches it")
    library = FOLDER / "libamdhip64.so.7"
    if library.exists() and library.stat().st_mtime > (SOURCE / "runtime.cpp").stat().st_mtime:
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    names, wanted = {"libhiprtc.so.7", "libamdhip64.so"}, {}
    for path in CUPY.glob("cupy*/**/*.so"):
        text = subprocess.run(["objdump", "-pT", path], capture_output=True, text=True, check=True).stdout
        names |= set(_LIBRARY.findall(text))
        wanted |= {name: version for version, name in _WANTED.findall(text)}
    # What nothing here needs fails when it is called.
    missing = wanted.keys() - set(_OWN.findall((SOURCE / "runtime.cpp").read_text()))
    (FOLDER / "missing.c").write_text("".join(f"int {name}() {{ return 999; }}\n" for name in sorted(missing)))
    versions: dict[str, list[str]] = {}
    for name, version in wanted.items():
        if version:
            versions.setdefault(version, []).append(name)
    script = "".join(f"{version} {{ {'; '.join(sorted(own))}; }};\n" for version, own in sorted(versions.items()))
    (FOLDER / "versions").write_text(script)
    flags = ["-std=c++17", "-O1", "-g", "-fPIC", "-shared", "-pthread", "-Wall", "-Wextra"]
    subprocess.run(["gcc", "-c", "-w", "-fPIC", "missing.c"], cwd=FOLDER, check=True)
    linked = ["missing.o", "-Wl,--version-script=versions", "-ldl", "-lrt", "-o", "new.so"]
    subprocess.run(["g++", *flags, str(SOURCE / "runtime.cpp"), *linked], cwd=FOLDER, check=True)
    for name in names - {library.name}:
        (FOLDER / name).unlink(missing_ok=True)
        (FOLDER / name).symlink_to(library.name)
    hipcc = FOLDER / "hipcc"
    said = r"#include <...> search starts here:\n /usr/include\nEnd of search list.\n"
    hipcc.write_text(f"#!/bin/sh\nprintf '{said}' >&2\n")
    hipcc.chmod(0o755)
    # Last: it is what tells that all is there.
    (FOLDER / "new.so").replace(library)


def environment() -> dict[str, str]:
    """Return the variables under which a process finds all that."""
    return os.environ | {
        "PYTHONPATH": f"{CUPY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "LD_LIBRARY_PATH": str(FOLDER),
        "PATH": f"{FOLDER}{os.pathsep}{os.environ.get('PATH', '')}",
        "ROCM_HOME": str(FOLDER),
        "ROCM_PRELUDE": str(SOURCE / "prelude.h"),
        "CPLUS_INCLUDE_PATH": str(KERNELS),
        "CUPY_CACHE_DIR": str(FOLDER / "cache"),
        "MPILLAMA_TEST_GPU": "hip",
        "MPILLAMA_TEST_GPU_GRAPHS": "1",
    }


if __name__ == "__main__":
    try:
        build()
    except FileNotFoundError as error:
        sys.exit(f"emulated_rocm: {error}")
    sys.exit(subprocess.run([sys.executable, *sys.argv[1:]], env=environment()).returncode)
