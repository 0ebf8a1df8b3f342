"""mpillama: run LLMs from GGUF files as an ordinary MPI program."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# Loaded when first asked for: the command line must answer --help without NumPy, MPI and the model's code.
_MODULES = {
    "LLM": "llm",
    **dict.fromkeys(("Choice", "Completion", "GenerationParams", "Logprob", "Piece", "ToolCall"), "results"),
    "UserError": "errors",
}
__all__ = [*_MODULES, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
