"""A picture of results: tokens per second over the number of ranks, the depth of the context, or the threads."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from mpillama.errors import UsageError, UserError

# What is drawn along the x axis: the first of these that varies.
_AXES = (("n_ranks", "ranks"), ("n_depth", "tokens in the context"), ("n_threads", "threads per rank"))
_SETTINGS = ("n_batch", "n_ubatch", "type_k", "type_v", "tensor_split")

Row = dict[str, Any]


def import_matplotlib() -> ModuleType:
    """Return matplotlib, set to draw without a screen.

    Raises:
        UsageError: it is not installed.
    """
    try:
        matplotlib = import_module("matplotlib")
    except ModuleNotFoundError:
        raise UsageError("--plot needs matplotlib; install it with: pip install 'mpillama[plot]'") from None
    matplotlib.use("Agg")
    return matplotlib


def read_results(path: Path) -> list[Row]:
    """Return the rows of a file written with ``-o json`` or ``-o jsonl``.

    Raises:
        UsageError: it cannot be read, or is something else.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--plot-add {path}: {getattr(error, 'strerror', None) or 'not a text file'}") from None
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.splitlines() if x]
        complete = all({"avg_ts", "test", "model_type", *(key for key, _ in _AXES)} <= row.keys() for row in rows)
    except (ValueError, AttributeError):
        complete = False
    if not complete:
        raise UsageError(f"--plot-add {path}: these are not results of mpillama bench -o json or -o jsonl")
    return list(rows)


def curves(rows: Sequence[Row]) -> tuple[str, dict[str, list[tuple[float, float, float]]]]:
    """Sort rows into curves.

    Returns:
        The label of the x axis, and by label of the curve its points (x, tokens per second, their spread) in order.
    """
    # Equal shares are written differently for each number of ranks, but are one setting.
    rows = [{**row, "tensor_split": _unequal(str(row.get("tensor_split", "")))} for row in rows]
    key, label = next(((k, text) for k, text in _AXES if len({row[k] for row in rows}) > 1), _AXES[0])
    # A name is part of a curve's label if it tells curves apart; the test's name without its depth always is.
    telling = [
        name
        for name in ("model_type", "backends", *(k for k, _ in _AXES), *_SETTINGS)
        if name != key and len({row.get(name) for row in rows}) > 1
    ]
    found: dict[str, list[tuple[float, float, float]]] = {}
    for row in rows:
        words = [str(row["test"]).split(" @ ")[0], *(_words(name, row.get(name)) for name in telling)]
        ours = (row["avg_ts"], row.get("stddev_ts") or 0.0)
        found.setdefault(", ".join(words), []).append((row[key], *ours))
        if row.get("peer_avg_ts"):
            theirs = (row["peer_avg_ts"], row.get("peer_stddev_ts") or 0.0)
            found.setdefault(", ".join([*words, str(row["peer"])]), []).append((row[key], *theirs))
    return label, {name: sorted(points) for name, points in found.items()}


def _unequal(tensor_split: str) -> str:
    return "equal" if len(set(tensor_split.split("/"))) == 1 else tensor_split


def _words(name: str, value: Any) -> str:
    titles = {"n_ranks": "ranks", "n_depth": "depth", "n_threads": "threads"}
    return str(value) if name in ("model_type", "backends") else f"{titles.get(name, name)} {value}"


def plot(rows: Iterable[Row], path: Path) -> None:
    """Draw rows into a file whose suffix says the format (png, svg, pdf).

    Raises:
        UserError: the file cannot be written.
    """
    import_matplotlib()
    pyplot: Any = import_module("matplotlib.pyplot")
    label, found = curves(list(rows))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name, points in found.items():
        x, y, spread = zip(*points, strict=True)
        axes.errorbar(x, y, yerr=spread, marker="o", capsize=3, label=name)
    axes.set(xlabel=label, ylabel="tokens per second", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UserError(f"--plot {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        pyplot.close(figure)
