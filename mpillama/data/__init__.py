"""Files that come with the package: a small trained model to try things with."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def demo_model_path() -> Path:
    """The path of `demo.gguf`, a story-telling model of about 4 MB (README.md next to it says more)."""
    return Path(str(resources.files(__package__) / "demo.gguf"))
