"""The sharding table: which tensor is cut along which axis, and by which cut.

Terms are GGUF's: the *out* axis are a weight's rows (one for each output), the *in* axis runs along a row. A weight cut
on its out axis makes a sharded result; one cut on its in axis takes a sharded input and makes a partial sum. The
members of a pair (gate, up and down; q, k, v and o) share a cut, so that what one makes the next can take as it is.
A stack of experts can also be cut on its third axis, into whole experts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from mpillama.config import Config
from mpillama.gguf.reader import TensorInfo
from mpillama.gguf.types import row_bytes
from mpillama.layout import REPLICATE, Cut, Layout, Routed, Shard, split, split_heads

# Name of the tensor within its block -> axis, cut. "vector" is the only axis of a bias or a norm over a cut axis.
# What is not named here is replicated.
TABLE: tuple[tuple[str, str, str], ...] = (
    (r"(token_embd|output)\.weight", "out", "vocab"),
    (r"output\.bias", "vector", "vocab"),
    (r"attn_q\.weight", "out", "q"),
    (r"attn_k\.weight", "out", "k"),
    (r"attn_v\.weight", "out", "v"),
    (r"attn_output\.weight", "in", "o"),
    (r"attn_q\.bias", "vector", "q"),
    (r"attn_k\.bias", "vector", "k"),
    (r"attn_v\.bias", "vector", "v"),
    (r"attn_sinks\.weight", "vector", "head"),
    (r"ffn_(gate|up)\.weight", "out", "ff"),
    (r"ffn_(gate|up)\.bias", "vector", "ff"),
    (r"ffn_down\.weight", "in", "ff"),
    (r"ffn_(gate|up)_exps\.weight", "out", "ff_exp"),
    (r"ffn_(gate|up)_exps\.bias", "vector", "ff_exp"),
    (r"ffn_down_exps\.weight", "in", "ff_exp"),
    (r"ffn_(gate|up)_shexp\.weight", "out", "ff_shexp"),
    (r"ffn_down_shexp\.weight", "in", "ff_shexp"),
)
# Only of architectures that norm the whole width of q and k; a norm of single heads is replicated.
FULL_QK_NORM = ((r"attn_q_norm\.weight", "vector", "q"), (r"attn_k_norm\.weight", "vector", "k"))
# Of blocks whose experts stay whole; a number for each expert (a scale) is replicated.
WHOLE_EXPERTS = ((r"ffn_(gate|up|down)_exps\.(weight|bias)", "expert", "expert"),)
_BLOCK = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Placement:
    """How one tensor lies over the ranks: ``axis`` is ``out``, ``in``, ``vector``, ``expert``, or "" for replicated."""

    axis: str = ""
    cut: Cut | None = None

    @property
    def layout(self) -> Layout:
        """The layout of a vector of this placement, or of the biases of experts."""
        if self.cut is None:
            return REPLICATE
        return Routed(self.cut) if self.axis == "expert" else Shard(self.cut)


@dataclass(frozen=True)
class Slice:
    """What one rank holds of a tensor: rows [row_start, row_stop) of matrices, and bytes [col_start, col_stop).

    Attributes:
        n_mats: matrices (experts) of the slice, the first of which is ``mat_start`` of the tensor.
        pad: elements that the slice has before and after the rank's own range of the in axis, because quant blocks
            are whole; the input is padded with as many zeros.
        n_in: elements of each row of the slice, pads included.
    """

    row_start: int
    row_stop: int
    col_start: int
    col_stop: int
    n_mats: int
    n_in: int
    pad: tuple[int, int] = (0, 0)
    mat_start: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of each matrix of the slice."""
        return self.row_stop - self.row_start

    @property
    def row_bytes(self) -> int:
        """Bytes of each row of the slice."""
        return self.col_stop - self.col_start

    @property
    def nbytes(self) -> int:
        """Bytes of the slice."""
        return self.n_mats * self.n_rows * self.row_bytes


class Sharding:
    """The cuts of one model, or of one stage of it, over the ranks that share it.

    Args:
        cfg: of the model.
        weights: the shares of the ranks.
        blocks: of the stage; all by default. The embedding comes with the first block, the head with the last.
        whole_experts: blocks whose experts are cut into whole experts.
    """

    def __init__(
        self,
        cfg: Config,
        weights: Sequence[float],
        blocks: range | None = None,
        whole_experts: Collection[int] = (),
    ) -> None:
        self.weights = tuple(weights)
        self.n_ranks = len(self.weights)
        self.blocks = range(cfg.n_layer) if blocks is None else blocks
        self.whole_experts = frozenset(whole_experts)
        self._n_layer = cfg.n_layer
        self._table = TABLE + (FULL_QK_NORM if cfg.arch.qk_norm == "full" else ())
        q, kv = split_heads(cfg.n_head, cfg.n_head_kv, self.weights)
        self.cuts: dict[str, Cut] = {
            "vocab": split(cfg.n_vocab, self.weights),
            "head": q,
            "q": q.scaled(cfg.n_embd_head_k),
            "o": q.scaled(cfg.n_embd_head_v),
            "k": kv.scaled(cfg.n_embd_head_k),
            "v": kv.scaled(cfg.n_embd_head_v),
        }
        for name, size in (("ff", cfg.n_ff), ("ff_exp", cfg.n_ff_exp), ("ff_shexp", cfg.n_ff_shexp)):
            if size:
                self.cuts[name] = split(size, self.weights)
        if cfg.n_expert:
            self.cuts["expert"] = split(cfg.n_expert, self.weights, grains=(1,))

    def holds(self, info: TensorInfo) -> bool:
        """Whether the ranks hold anything of a tensor; what belongs to no block in particular is held by all."""
        block = _BLOCK.match(info.name)
        if block:
            return int(block[1]) in self.blocks
        if info.name.startswith("token_embd."):
            return self.blocks.start == 0
        return not info.name.startswith("output") or self.blocks.stop == self._n_layer

    def placement(self, info: TensorInfo) -> Placement:
        """Return how a tensor lies over the ranks."""
        if self.n_ranks == 1:
            return Placement()
        name = _BLOCK.sub("", info.name)
        block = _BLOCK.match(info.name)
        whole = WHOLE_EXPERTS if block and int(block[1]) in self.whole_experts else ()
        for pattern, axis, cut_name in (*whole, *self._table):
            if re.fullmatch(pattern, name):
                return Placement(axis, self.cuts[cut_name])
        return Placement()

    def slice_of(self, info: TensorInfo, rank: int) -> Slice:
        """Return what ``rank`` holds of a tensor."""
        place = self.placement(info)
        n_in = info.shape[0]
        n_rows = info.shape[1] if len(info.shape) > 1 else 1
        n_mats = info.shape[2] if len(info.shape) > 2 else 1
        start, stop = place.cut.ranges[rank] if place.cut else (0, 0)
        if place.axis == "out":
            return Slice(start, stop, 0, row_bytes(info.type, n_in), n_mats, n_in)
        if place.axis == "expert" and len(info.shape) > 2:
            return Slice(0, n_rows, 0, row_bytes(info.type, n_in), stop - start, n_in, mat_start=start)
        if place.axis == "expert":
            return Slice(start, stop, 0, row_bytes(info.type, n_in), n_mats, n_in)
        if place.axis == "":
            return Slice(0, n_rows, 0, row_bytes(info.type, n_in), n_mats, n_in)
        block = info.type.block_size
        first = start // block * block
        last = min(n_in, -(-stop // block) * block) if stop > start else first
        return Slice(
            0,
            n_rows,
            row_bytes(info.type, first),
            row_bytes(info.type, last),
            n_mats,
            last - first,
            (start - first, last - stop) if stop > start else (0, 0),
        )

    def bytes_of(self, tensors: Iterable[TensorInfo], rank: int) -> int:
        """Return the bytes that ``rank`` holds (and reads) of these tensors; one that is tied counts once."""
        distinct = {(info.part, info.offset, info.shape): info for info in tensors if self.holds(info)}
        return sum(self.slice_of(info, rank).nbytes for info in distinct.values())
