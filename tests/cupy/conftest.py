"""These tests need the environment that `emulated_cupy.py` makes; without it they are skipped."""

import os
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "jobs"), str(TESTS / "unit")]


def pytest_collection_modifyitems(items):
    if "EMULATED_PRELUDE" in os.environ:
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="CuPy on emulated GPUs: make test-cupy"))
