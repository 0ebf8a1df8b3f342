"""Walking a model: its own text, run on shapes, tells what each rank computes, sends and holds in a step.

Blocks whose tensors have the same shapes and types, and whose attention has the same window, do the same work; one of
each kind is walked. The first block is a kind of its own, as it completes the embedding, and so is the last, which
drops the tokens whose logits nobody wants.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from mpillama.backends.base import Batch, RawWeight
from mpillama.config import Config, read_config
from mpillama.gguf.reader import GGUFHeader, TensorInfo
from mpillama.layout import REPLICATE, Shard
from mpillama.models import forward
from mpillama.models.weights import Weights
from mpillama.ops import Ops
from mpillama.plan.shapes import Event, ShapeBackend, ShapeGroup, Tape, shaped
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors
from mpillama.values import Value, Weight

EMBEDDING, HEAD = "embedding", "head"


class PlanModel:
    """A model by its header.

    Attributes:
        kinds: for each block, the index into ``examples`` of the block that it is like.
        examples: a block of each kind, in order of first appearance.
        by_block: tensors of each block, and under -1 those outside of blocks.
    """

    def __init__(self, name: str, header: GGUFHeader, n_ctx: int = 0) -> None:
        self.name, self.cfg = name, read_config(header, n_ctx)
        self.tensors = model_tensors(header, self.cfg)
        self.by_block: dict[int, list[TensorInfo]] = {il: [] for il in range(-1, self.cfg.n_layer)}
        for info in self.tensors.values():
            il = int(info.name.split(".")[1]) if info.name.startswith("blk.") else -1
            self.by_block[il].append(info)
        self.kinds: list[int] = []
        self.examples: list[int] = []
        known: dict[object, int] = {}
        for il in range(self.cfg.n_layer):
            ends = il == 0, il == self.cfg.n_layer - 1
            kind = known.setdefault((self._signature(il), *ends), len(known))
            if kind == len(self.examples):
                self.examples.append(il)
            self.kinds.append(kind)

    def _signature(self, il: int) -> object:
        tensors = tuple(sorted((i.name.split(".", 2)[2], i.type, i.shape) for i in self.by_block[il]))
        return self.cfg.windows[il], tensors

    @property
    def n_params(self) -> int:
        """Number of weights; a tied head counts once."""
        return sum(math.prod(info.shape) for info in self._distinct(self.tensors.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights; a tied head counts once."""
        return sum(info.nbytes for info in self._distinct(self.tensors.values()))

    @staticmethod
    def _distinct(tensors: Iterable[TensorInfo]) -> Iterable[TensorInfo]:
        return {(info.part, info.offset, info.shape): info for info in tensors}.values()

    def outside(self, first: bool, last: bool) -> list[TensorInfo]:
        """Return the tensors outside of blocks that a stage holds which has the first or the last block."""
        return [info for info in self.by_block[-1] if (last if info.name.startswith("output") else first)]

    @cached_property
    def reduced(self) -> Config:
        """The configuration of a model of one block of each kind; its last block is this model's last."""
        windows = tuple(self.cfg.windows[il] for il in self.examples)
        return replace(self.cfg, n_layer=len(self.examples), windows=windows)


@dataclass(frozen=True)
class Walk:
    """What one rank does in a step.

    Attributes:
        parts: events of the embedding, of one block of each kind (by its index as a string) and of the head.
        buffers: bytes of activations alive at the worst moment.
    """

    parts: dict[str, tuple[Event, ...]]
    buffers: int

    def all(self, model: PlanModel) -> Iterable[tuple[Event, int]]:
        """Yield every event of a whole step, and how often it comes: in order within a block."""
        counts = Counter(map(str, model.kinds))
        for part, events in self.parts.items():
            for event in events:
                yield event, counts.get(part, 1)


def step_batch(n_seqs: int, n_tokens: int, n_past: int, n_logits: int = 1) -> Batch:
    """Return a batch of ``n_seqs`` sequences of ``n_tokens`` new tokens each, after ``n_past`` others.

    ``n_logits`` of each sequence's tokens, the last ones, have logits.
    """
    positions = np.tile(np.arange(n_past, n_past + n_tokens, dtype=np.int32), n_seqs)
    ends = np.arange(1, n_seqs + 1, dtype=np.int32)[:, None] * n_tokens
    rows = (ends - np.arange(n_logits, 0, -1, dtype=np.int32)).ravel()
    lens = np.full(n_seqs, n_tokens, np.int32)
    return Batch(np.zeros(n_seqs * n_tokens, np.int32), positions, lens, np.zeros((n_seqs, 1), np.int32), rows)


class _MarkedWeights(Weights):
    """Weights that tell a tape when the model's text turns to a block, and to what comes after the last."""

    tape: Tape

    def block(self, il: int) -> Weights:
        self.tape.part = str(il)
        return super().block(il)

    def vector(self, name: str) -> Value:
        if name.startswith("output"):
            self.tape.part = HEAD
        return super().vector(name)


def walk(model: PlanModel, sharding: Sharding, rank: int, batch: Batch, type_k: str, type_v: str) -> Walk:
    """Run the model's text on shapes, as ``rank`` of a tensor-parallel group."""
    tape, cfg = Tape(), model.reduced
    backend = ShapeBackend(tape)
    weights = _ghost_weights(model, sharding, rank, backend)
    weights.tape = tape
    n_k, n_v = cfg.n_embd_head_k, cfg.n_embd_head_v
    cache = backend.new_cache(0, sharding.cuts["k"].width(rank) // n_k, n_k, n_v, type_k, type_v)
    ops = Ops(backend, ShapeGroup(tape, rank, sharding.n_ranks))
    logits = forward(ops, weights, cfg, [cache] * cfg.n_layer, batch)
    del logits
    names = [EMBEDDING, *map(str, range(cfg.n_layer)), HEAD]
    parts = {name: tuple(event for event in tape.events if event.part == name) for name in names}
    return Walk(parts, tape.peak)


def _ghost_weights(model: PlanModel, sharding: Sharding, rank: int, backend: ShapeBackend) -> _MarkedWeights:
    """Return a rank's slices without their bytes, of the embedding, the head and one block of each kind."""
    matrices: dict[str, Weight] = {}
    vectors: dict[str, Value] = {}
    for block, source in ((-1, -1), *enumerate(model.examples)):
        for info in model.by_block[source]:
            name = info.name if block < 0 else f"blk.{block}.{info.name.split('.', 2)[2]}"
            place, part = sharding.placement(info), sharding.slice_of(info, rank)
            shape = (part.n_mats, part.n_rows, part.row_bytes)
            raw = RawWeight(name, info.type, np.broadcast_to(np.uint8(0), shape), part.n_in, part.pad)
            if name.endswith(".weight") and len(info.shape) > 1:
                matrices[name] = Weight(name, backend.weight(raw), place.axis, place.cut)
            else:
                width = place.cut.width(rank) if place.cut else info.shape[0]
                data = shaped((info.shape[1], width) if len(info.shape) > 1 else (width,))
                vectors[name] = Value(data, Shard(place.cut) if place.cut else REPLICATE)
    return _MarkedWeights(matrices, vectors)


def rank_classes(sharding: Sharding) -> list[tuple[int, int]]:
    """Return a rank of each kind, and how many are like it: same widths, same place of the cut within quant blocks."""
    first: dict[object, int] = {}
    counts: Counter[object] = Counter()
    for rank in range(sharding.n_ranks):
        key = tuple((stop - start, start % 256) for start, stop in (cut.ranges[rank] for cut in sharding.cuts.values()))
        first.setdefault(key, rank)
        counts[key] += 1
    return [(rank, counts[key]) for key, rank in first.items()]
