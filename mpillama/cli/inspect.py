"""`mpillama inspect`: a model's metadata and tensors, and what each of N ranks would hold; starts no MPI."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpillama.cli.progress import format_bytes
from mpillama.cli.session import grid_of, model_path
from mpillama.cli.shares import given_shares
from mpillama.config import read_config
from mpillama.errors import ModelError
from mpillama.gguf.reader import GGUFHeader, TensorInfo, read_header
from mpillama.layout import check_weights
from mpillama.partition import Partition
from mpillama.tensors import model_tensors

# Longer arrays and strings are cut in the text for people.
_SHOWN_ITEMS = 8
_SHOWN_CHARS = 120


def run(args: Namespace) -> int:
    """Print what the flags ask for; returns the exit code."""
    header = read_header(model_path(args))
    try:
        ranks: dict[str, Any] | str = _ranks(header, args)
    except ModelError as error:
        # A file that cannot be run can still be looked at.
        if args.n_ranks > 1 or args.tensor_split:
            raise
        ranks = str(error)
    if args.json:
        print(json.dumps(_as_json(header, ranks), indent=1))
    else:
        print("\n".join(_as_text(header, ranks)))
    return 0


def _ranks(header: GGUFHeader, args: Namespace) -> dict[str, Any]:
    """Return how the model would lie over the ranks, if they were on one host."""
    cfg = read_config(header)
    tensors = model_tensors(header, cfg)
    grid = grid_of(args, ("",) * args.n_ranks, cfg.n_layer)
    weights = check_weights(given_shares(args.tensor_split), args.n_ranks)
    partition = Partition(cfg, tensors, grid, weights, args.ep)
    totals = [partition.bytes_of(rank) for rank in range(args.n_ranks)]
    ideal = sum(totals) / sum(weights)
    return {
        "n_ranks": args.n_ranks,
        "tp": grid.tp,
        "pp": grid.pp,
        "stages": [[stage.blocks.start, stage.blocks.stop] for stage in partition.stages],
        "tensor_split": list(weights),
        "bytes_per_rank": totals,
        "imbalance": max(t / (ideal * w) for t, w in zip(totals, weights, strict=True) if w > 0) - 1.0,
        "tensors": [_of_tensor(info, partition) for info in tensors.values()],
    }


def _of_tensor(info: TensorInfo, partition: Partition) -> dict[str, Any]:
    """Return how a tensor lies over the ranks of the stages that hold it; elsewhere it has no bytes."""
    n_ranks = partition.grid.size
    rows, split, ranges = [0] * n_ranks, "replicated", None
    for rank in range(n_ranks):
        sharding, index = partition.of(rank)
        if not sharding.holds(info):
            continue
        place = sharding.placement(info)
        rows[rank] = sharding.slice_of(info, index).nbytes
        if place.cut:
            split = place.axis
            ranges = ranges or [[0, 0] for _ in range(n_ranks)]
            ranges[rank] = list(place.cut.ranges[index])
    return {
        "name": info.name,
        "type": info.type.name,
        "shape": list(info.shape),
        "split": split,
        "ranges": ranges,
        "bytes": rows,
    }


def _as_json(header: GGUFHeader, ranks: dict[str, Any] | str) -> dict[str, Any]:
    return {
        "files": list(header.paths),
        "version": header.version,
        "alignment": header.alignment,
        "metadata": {key: _plain(value) for key, value in header.metadata.items()},
        "tensors": [
            {"name": i.name, "type": i.type.name, "shape": list(i.shape), "bytes": i.nbytes, "offset": i.offset}
            for i in header.tensors.values()
        ],
        "ranks": {"error": ranks} if isinstance(ranks, str) else ranks,
    }


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold; long arrays become their length and their first items."""
    if isinstance(value, str | bool | int | float):
        return value
    items = [_plain(item.item() if isinstance(item, np.generic) else item) for item in value[:_SHOWN_ITEMS]]
    return items if len(value) <= _SHOWN_ITEMS else {"length": len(value), "first": items}


def _as_text(header: GGUFHeader, ranks: dict[str, Any] | str) -> list[str]:
    n_bytes = sum(info.nbytes for info in header.tensors.values())
    lines = [*header.paths, f"GGUF version {header.version}, alignment {header.alignment}", "", "metadata"]
    lines += [f"  {key} = {_shown(value)}" for key, value in header.metadata.items()]
    lines += ["", f"tensors: {len(header.tensors)}, {format_bytes(n_bytes)}"]
    lines += _table(
        ("name", "type", "shape", "bytes"),
        [(i.name, i.type.name, _shape(i), format_bytes(i.nbytes)) for i in header.tensors.values()],
    )
    if isinstance(ranks, str):
        return [*lines, "", f"mpillama cannot run this model: {ranks}"]
    lines += [
        "",
        f"{ranks['n_ranks']} rank{'s' if ranks['n_ranks'] > 1 else ''}, tensor split {_join(ranks['tensor_split'])}",
    ]
    if ranks["pp"] > 1:
        lines[-1] += f", {ranks['pp']} stages of {ranks['tp']}"
    lines += [
        f"  rank {rank}: {format_bytes(n)}" + _blocks(ranks, rank) for rank, n in enumerate(ranks["bytes_per_rank"])
    ]
    lines += [f"  imbalance: the fullest rank holds {100 * ranks['imbalance']:.1f} % more than its share"]
    if ranks["n_ranks"] > 1:
        rows = [(t["name"], t["split"], _ranges(t["ranges"]), _each(t["bytes"])) for t in ranks["tensors"]]
        lines += _table(("tensor", "split", "range of each rank", "bytes of each rank"), rows)
    return lines


def _blocks(ranks: dict[str, Any], rank: int) -> str:
    first, end = ranks["stages"][rank // ranks["tp"]]
    return f" (blocks {first} to {end - 1})" if ranks["pp"] > 1 else ""


def _shape(info: TensorInfo) -> str:
    return " x ".join(map(str, info.shape))


def _shown(value: Any) -> str:
    if isinstance(value, str):
        text = value if len(value) <= _SHOWN_CHARS else f"{value[:_SHOWN_CHARS]}… ({len(value)} characters)"
        return repr(text)
    if isinstance(value, bool | int | float):
        return f"{value:.9g}" if isinstance(value, float) else str(value)
    items = ", ".join(_shown(item.item() if isinstance(item, np.generic) else item) for item in value[:_SHOWN_ITEMS])
    return f"[{items}]" if len(value) <= _SHOWN_ITEMS else f"[{items}, …] ({len(value)} items)"


def _join(numbers: list[float]) -> str:
    return ",".join(f"{number:g}" for number in numbers)


def _ranges(ranges: list[list[int]] | None) -> str:
    return " ".join(f"{start}:{stop}" if stop else "-" for start, stop in ranges) if ranges else "all"


def _each(sizes: list[int]) -> str:
    return format_bytes(sizes[0]) if len(set(sizes)) == 1 else " ".join(format_bytes(size) for size in sizes)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    return [f"  {line.rstrip()}" for line in lines]
