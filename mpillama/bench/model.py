"""The model of a benchmark: what every rank must know of it, its weights, and what a step reads of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mpillama.backends.base import Backend
from mpillama.bench.shapes import shape_header, split_spec
from mpillama.bench.weights import random_weights
from mpillama.config import Config, read_config
from mpillama.errors import UsageError
from mpillama.gguf.reader import GGUFHeader, TensorInfo, read_header
from mpillama.grid import ONE_RANK, Grid
from mpillama.layout import check_weights
from mpillama.loader import check_types, load_weights
from mpillama.models.weights import Weights
from mpillama.reading import ReadWatch
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors


@dataclass(frozen=True)
class BenchModel:
    """What every rank must know to load its slices; small, and broadcast by rank 0.

    Attributes:
        filename: as given; a shape's name for random weights.
        type_name: architecture, size and quantization in words.
        size: bytes of all tensors, and ``n_params`` their elements.
        paths: of the files; empty for random weights.
        shares: of the ranks.
        n_ctx: tokens that the KV cache holds.
        grid: of the ranks.
    """

    filename: str
    type_name: str
    size: int
    n_params: int
    paths: tuple[str, ...]
    cfg: Config
    tensors: dict[str, TensorInfo]
    shares: tuple[float, ...]
    n_ctx: int
    grid: Grid = ONE_RANK


def describe(
    name: str, path: str | None, tensor_split: Sequence[float], n_ranks: int, n_ctx: int, backend: Backend
) -> BenchModel:
    """Read the header of the file ``path``, or make that of the shape ``name`` where there is none.

    Raises:
        UserError: the model cannot be run, or the shares do not fit the number of ranks.
    """
    if tensor_split and len(tensor_split) != n_ranks:
        given = "/".join(f"{share:g}" for share in tensor_split)
        raise UsageError(
            f"-ts {given} gives {len(tensor_split)} of {n_ranks} ranks a share; in bench, shares are separated by / "
            "and a comma begins another split, e.g. -ts 1/1,3/1"
        )
    shares = check_weights(tensor_split, n_ranks)
    header = shape_header(name) if path is None else read_header(path)
    cfg = read_config(header, n_ctx)
    tensors = model_tensors(header, cfg)
    check_types(tensors.values(), backend)
    infos = header.tensors.values()
    size = sum(info.nbytes for info in infos)
    n_params = sum(math.prod(info.shape) for info in infos)
    words = " ".join(split_spec(name)) if path is None else _type_name(header, n_params)
    return BenchModel(name, words, size, n_params, header.paths, cfg, tensors, shares, n_ctx)


def _type_name(header: GGUFHeader, n_params: int) -> str:
    from gguf import LlamaFileType

    def known(key: str) -> Any:
        return header.metadata.get(f"general.{key}")

    label = known("size_label")
    if not isinstance(label, str):
        label = f"{n_params / 1e9:.3g}B" if n_params >= 1e9 else f"{n_params / 1e6:.3g}M"
    try:
        file_type = LlamaFileType(known("file_type")).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        file_type = _commonest_type(header.tensors)
    return f"{known('architecture')} {label} {file_type}"


def _commonest_type(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the type that most weights have."""
    counts: dict[str, int] = {}
    for info in tensors.values():
        counts[info.type.name] = counts.get(info.type.name, 0) + math.prod(info.shape)
    return max(counts, key=lambda name: counts[name])


def load(
    model: BenchModel,
    sharding: Sharding,
    rank: int,
    backend: Backend,
    progress: Callable[[int], None],
    watch: ReadWatch | None = None,
) -> Weights:
    """Read or make a rank's weights."""
    if model.paths:
        return load_weights(model.paths, model.tensors, sharding, rank, backend, progress, watch)[0]
    return random_weights(model.tensors, sharding, rank, backend, progress)


@dataclass(frozen=True)
class StepBytes:
    """Bytes of weights that all ranks together read in a step; replicated tensors count once for each rank.

    Attributes:
        blocks: what every step reads.
        head: output.weight, read if logits are wanted.
        experts: of all experts of all blocks.
        n_expert: in a block; 0: none.
        n_expert_used: chosen for a token.
    """

    blocks: int
    head: int
    experts: int
    n_expert: int
    n_expert_used: int

    def of(self, n_tokens: int, n_logits: int) -> float:
        """Return the bytes of one step; experts are taken to be chosen evenly and independently for each token."""
        total = float(self.blocks + (self.head if n_logits else 0))
        if self.n_expert:
            total += self.experts * (1.0 - (1.0 - self.n_expert_used / self.n_expert) ** n_tokens)
        return total


def step_bytes(model: BenchModel, *stages: Sharding) -> StepBytes:
    """Count what steps of all stages read: every tensor but the rows of token_embd that are looked up."""
    sizes = {"blocks": 0, "head": 0, "experts": 0}
    for info in model.tensors.values():
        if info.name == "token_embd.weight":
            continue
        kind = "head" if info.name.startswith("output.") else "experts" if "_exps." in info.name else "blocks"
        for stage in stages:
            if stage.holds(info):
                sizes[kind] += sum(stage.slice_of(info, rank).nbytes for rank in range(stage.n_ranks))
    return StepBytes(**sizes, n_expert=model.cfg.n_expert, n_expert_used=model.cfg.n_expert_used)
