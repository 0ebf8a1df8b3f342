"""What each rank of a grid holds of a model: the stages of the pipeline, and the cuts within each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from mpillama.config import Config
from mpillama.experts import whole_expert_blocks
from mpillama.gguf.reader import TensorInfo
from mpillama.grid import Grid, cut_blocks
from mpillama.sharding import Sharding


class Partition:
    """The cuts of a model over a grid.

    Args:
        cfg: of the model.
        tensors: of the model.
        grid: of the run.
        weights: the shares of the ranks of a replica; all replicas are alike.
        experts: one of `mpillama.experts.MODES`.

    Raises:
        UsageError: a stage has no share.
    """

    def __init__(
        self,
        cfg: Config,
        tensors: Mapping[str, TensorInfo],
        grid: Grid,
        weights: Sequence[float],
        experts: str = "auto",
    ) -> None:
        self.grid, self._cfg, self._tensors = grid, cfg, tensors
        shares = grid.stage_weights(weights)
        self.stages = tuple(
            Sharding(cfg, own, range(*blocks), whole_expert_blocks(cfg, tensors.values(), own, experts))
            for own, blocks in zip(shares, cut_blocks(cfg.n_layer, shares), strict=True)
        )

    def of(self, rank: int) -> tuple[Sharding, int]:
        """Return the cuts of a rank's stage, and the rank's index there."""
        place = self.grid.place(rank)
        return self.stages[place.stage], place.index

    def bytes_of(self, rank: int, tensors: Iterable[TensorInfo] | None = None) -> int:
        """Return the bytes of weights that a rank holds, of all tensors or of these."""
        sharding, index = self.of(rank)
        return sharding.bytes_of(self._tensors.values() if tensors is None else tensors, index)

    def n_head_kv(self, rank: int) -> int:
        """Return the KV heads that a rank holds in each of its blocks."""
        sharding, index = self.of(rank)
        return sharding.cuts["k"].width(index) // self._cfg.n_embd_head_k

    @cached_property
    def whole_experts(self) -> frozenset[int]:
        """The blocks whose experts are cut into whole experts."""
        return frozenset(il for stage in self.stages for il in stage.whole_experts if il in stage.blocks)
