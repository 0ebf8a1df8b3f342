"""The folder of models and vocabularies that tests may use if it is there: ``MPILLAMA_SHARED``, or ``../shared``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def shared(*parts: str) -> Path:
    """Return a path in the shared folder; skips the test if there is no such file."""
    root = Path(os.environ.get("MPILLAMA_SHARED") or Path(__file__).parents[2] / "shared")
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{'/'.join(parts)} is not in {root}; set MPILLAMA_SHARED to the folder that has it")
    return path
