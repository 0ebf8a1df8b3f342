"""Run kernel tests with an extension that watches its memory accesses and its arithmetic.

    python tests/run_sanitized.py [pytest arguments]

Builds the extension with gcc's or clang's address and undefined-behaviour sanitizers into build/sanitize, and ends with
an error at the first thing they find. The compiler is $CXX, or else c++.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "sanitize"
TESTS = ("test_cpu_attention.py", "test_cpu_elementwise.py", "test_cpu_matmul.py", "test_cpu_backend.py")
# The sanitizer keeps what was freed for a while, to find who uses it still.
LEFT_OUT = "not need_no_more_memory"
CHILD = "--with-extension"


def build() -> Path:
    """Build what changed and return the extension's path."""
    settings = ["cmake.define.MPILLAMA_SANITIZE=ON", f"build-dir={TARGET}/cmake"]
    options = [argument for setting in settings for argument in ("-C", setting)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", TARGET / "site"]
    subprocess.run([*command, *options, ROOT], check=True)
    return next((TARGET / "site" / "mpillama").glob("_cpu*.so"))


def runtime(name: str) -> str:
    """Return the path of a sanitizer's library, which must be there before the interpreter's own."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_with(extension: str, arguments: list[str]) -> int:
    """Run pytest in this process with another extension."""
    import mpillama

    spec = spec_from_file_location("mpillama._cpu", extension)
    assert spec
    assert spec.loader
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.modules["mpillama._cpu"] = module
    mpillama._cpu = module  # type: ignore[attr-defined]
    return pytest.main(arguments)


def main(arguments: list[str]) -> int:
    """Build, then run the tests in a process that begins with the sanitizers."""
    extension = build()
    # Python itself leaks on purpose.
    environment = os.environ | {
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    tests = [str(ROOT / "tests" / "unit" / name) for name in TESTS]
    command = [sys.executable, __file__, CHILD, str(extension), "--no-header", "--capture=sys", "-k", LEFT_OUT]
    command += [*tests, *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        sys.exit(run_with(sys.argv[2], sys.argv[3:]))
    sys.exit(main(sys.argv[1:]))
