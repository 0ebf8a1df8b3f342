"""Build the native code for 64-bit ARM, and run its tests on an emulated processor of that kind.

    python tests/run_arm.py [pytest arguments]
    build/arm/python -m mpillama.cli.main generate -p "Once upon a time"

Needs Linux with qemu-user-static, g++-aarch64-linux-gnu and apt, which brings an interpreter for ARM from the system's
own sources, without root. All of it stays in build/arm. Without pytest arguments: the tests of the kernels, at every
level that the emulated processor has, then the MPI tests on two ranks. Nothing here says how fast anything is.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARM = ROOT / "build" / "arm"
PYTHON = ARM / "python"
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
UNIT = ("test_cpu_matmul.py", "test_cpu_elementwise.py", "test_cpu_attention.py")
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libpython3-dev", "libstdc++6")
LEVELS = {  # of processors that QEMU knows
    "cortex-a72": ["scalar", "neon"],
    "neoverse-n1": ["scalar", "neon", "dotprod"],
    "a64fx": ["scalar", "neon", "sve512"],
    "max,sve512=off": ["scalar", "neon", "dotprod", "i8mm"],
    "max": ["scalar", "neon", "dotprod", "i8mm", "sve512"],
}


def run(*command: str | Path) -> None:
    """Run a command, and end this program with its words if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"run_arm: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")


def fetch_interpreter(root: Path) -> None:
    """Unpack Python for ARM, its headers and the libraries it needs into a folder."""
    apt = ARM / "apt"
    for folder in ("lists/partial", "archives/partial"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures::": "arm64",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        "Debug::NoLocking": "1",
    }
    command = ["apt-get", "-qq", *(part for item in settings.items() for part in ("-o", f"{item[0]}={item[1]}"))]
    run(*command, "update")
    run(*command, "install", "--yes", "--download-only", "--no-install-recommends", *PACKAGES)
    for package in sorted((apt / "archives").glob("*.deb")):
        run("dpkg-deb", "--extract", package, root)
    shutil.rmtree(apt)


def fetch_packages(version: str, site: Path) -> None:
    """Install what mpillama and its tests import, as wheels for ARM."""
    requires = [requirement.split(";") for requirement in importlib.metadata.requires("mpillama") or ()]
    wanted = [name for name, *marker in requires if not any("extra" in part for part in marker)]
    # No browser, service or linter is started on the emulated processor.
    wanted += [name for name, *_ in requires if name.startswith(("hypothesis", "pytest"))]
    mpich = next(name for name, *_ in requires if name.startswith("mpich"))
    platforms = [part for minor in range(36, 16, -1) for part in ("--platform", f"manylinux_2_{minor}_aarch64")]
    pip = [sys.executable, "-m", "pip", "--quiet", "--no-input"]
    options = ["--only-binary=:all:", "--python-version", version, *platforms]
    run(*pip, "install", *options, "--platform", "manylinux2014_aarch64", "--target", site, *wanted)
    # The library lies among the wheel's data, which pip leaves out of a target.
    run(*pip, "download", *options, "--no-deps", "--dest", ARM / "wheels", mpich)
    for wheel in (ARM / "wheels").glob("mpich*.whl"):
        shutil.unpack_archive(wheel, ARM / "mpich", "zip")


def set_up() -> None:
    """Make build/arm/python, an interpreter that finds this checkout."""
    missing = [name for name in (COMPILER, QEMU, "apt-get", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        sys.exit(f"run_arm: {', '.join(missing)}: not found; apt install qemu-user-static g++-aarch64-linux-gnu")
    root, site, app = ARM / "root", ARM / "site", ARM / "app" / "mpillama"
    shutil.rmtree(app, ignore_errors=True)
    app.mkdir(parents=True)
    # Not the folder itself: what is built for ARM must not lie among what is built for this machine.
    for entry in (ROOT / "mpillama").iterdir():
        if entry.suffix != ".so" and entry.name != "__pycache__":
            (app / entry.name).symlink_to(entry)
    made = site / "sitecustomize.py"
    if not made.exists() or made.stat().st_mtime < (ROOT / "pyproject.toml").stat().st_mtime:
        for folder in (root, site, ARM / "wheels", ARM / "mpich"):
            shutil.rmtree(folder, ignore_errors=True)
        fetch_interpreter(root)
        fetch_packages((root / "usr/bin/python3").resolve().name.removeprefix("python"), site)
        made.write_text(f"import sys\n\nsys.executable = {str(PYTHON)!r}\n")
    interpreter, library = (root / "usr/bin/python3").resolve(), next((ARM / "mpich").rglob("libmpi.so.12"))
    # QEMU has no process_vm_readv, by which MPICH reads what lies in another rank.
    PYTHON.write_text(
        f"#!/bin/sh\nexport PYTHONPATH={app.parent}:{site} MPI4PY_LIBMPI={library} MPIR_CVAR_CH4_CMA_ENABLE=0\n"
        f'QEMU_CPU=${{QEMU_CPU:-max}} exec {QEMU} -L {root} {interpreter} "$@"\n'
    )
    PYTHON.chmod(0o755)


def build() -> None:
    """Build what changed of the extension modules."""
    root = ARM / "root"
    tag = re.sub(r"\D", "", next((root / "usr/include").glob("python3.*")).name)
    suffix = f".cpython-{tag}-aarch64-linux-gnu.so"
    settings = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": "aarch64",
        "CMAKE_CXX_COMPILER": COMPILER,
        "CMAKE_CXX_FLAGS": f"-isystem {root}/usr/include",
        "Python_EXECUTABLE": sys.executable,
        "Python_INCLUDE_DIR": next((root / "usr/include").glob("python3.*")),
        "NB_SUFFIX": suffix,
    }
    defined = [f"-D{key}={value}" for key, value in settings.items()]
    run("cmake", "-S", ROOT, "-B", ARM / "cmake", "-G", "Ninja", *defined)
    run("cmake", "--build", ARM / "cmake")
    for name in ("_cpu", "_shm"):
        shutil.copy(ARM / "cmake" / f"{name}{suffix}", ARM / "app" / "mpillama")


def check_levels() -> None:
    """See that each kind of processor finds its levels, and that those need nothing that it lacks."""
    for cpu, expected in LEVELS.items():
        environment = os.environ | {"QEMU_CPU": cpu}
        script = "import mpillama._cpu as c; print(*c.levels())"
        found = subprocess.run([PYTHON, "-c", script], env=environment, cwd=ARM, capture_output=True, text=True)
        if found.stdout.split() != expected:
            sys.exit(f"run_arm: levels of {cpu} are {found.stdout}{found.stderr}, not {' '.join(expected)}")
    # With no more than one level beside the plain one: the tests run on a processor that has all.
    story = [PYTHON, "-m", "mpillama.cli.main", "generate", "-p", "Once upon a time", "-n", "8"]
    for cpu in ("cortex-a72", "a64fx"):
        subprocess.run(story, env=os.environ | {"QEMU_CPU": cpu}, cwd=ARM, check=True)


def main(arguments: Sequence[str]) -> int:
    """Set up, build, run the tests; the exit code is that of the first run that failed."""
    set_up()
    build()
    check_levels()
    # Not `-m pytest`, which would find the package in this folder first.
    command = [PYTHON, ARM / "site" / "bin" / "pytest", *(arguments or [f"tests/unit/{name}" for name in UNIT])]
    # Emulation takes its time, above all where others come first.
    code = subprocess.run([*command, "-p", "no:cacheprovider", "--timeout=1200"], cwd=ROOT).returncode
    if arguments or code:
        return code
    ranks = [sys.executable, ROOT / "tests" / "run_mpi.py", "-n", "2", "--python", PYTHON, "--limit", "900", "--"]
    return subprocess.run([*ranks, ROOT / "tests" / "mpi"], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
