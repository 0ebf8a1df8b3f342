"""Layouts of values over ranks, and the cuts they are made of: pure functions of sizes and weights, no communication.

A *cut* divides one axis among ranks. Ranges may be uneven and empty; they may overlap where ranks share a KV head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from mpillama.errors import UsageError

Range = tuple[int, int]

# Coarse first: an aligned boundary is cheaper (whole quant blocks, whole cache lines), an even cut is cheaper still.
GRAINS = (256, 128, 64, 32, 16, 8, 4, 2, 1)
WIDTH_TOLERANCE = 0.10
# Cutting inside a group of query heads makes two ranks hold the same KV head, so it must win more.
HEAD_TOLERANCE = 0.30


@dataclass(frozen=True)
class Cut:
    """Ranges of an axis of ``size`` elements, one for each rank, with starts and stops that never decrease."""

    size: int
    ranges: tuple[Range, ...]

    def width(self, rank: int) -> int:
        """Return the number of elements that a rank holds."""
        start, stop = self.ranges[rank]
        return stop - start

    @cached_property
    def owned(self) -> tuple[Range, ...]:
        """Ranges without the overlaps: each element belongs to the first rank that holds it."""
        result, reached = [], 0
        for start, stop in self.ranges:
            first = min(max(start, reached), stop)
            result.append((first, stop))
            reached = max(reached, stop)
        return tuple(result)

    def scaled(self, factor: int) -> Cut:
        """Return the same cut of an axis whose elements are ``factor`` times finer (heads to head elements)."""
        return Cut(self.size * factor, tuple((a * factor, b * factor) for a, b in self.ranges))

    def imbalance(self, weights: Sequence[float]) -> float:
        """Return the largest share of a rank over its ideal share, minus one (0 is a perfect cut)."""
        total = sum(weights)
        loads = [self.width(r) * total / (w * self.size) for r, w in enumerate(weights) if w > 0 and self.size]
        return max(loads, default=1.0) - 1.0


@dataclass(frozen=True)
class Replicate:
    """Every rank has the whole value."""


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the ranks hold."""


@dataclass(frozen=True)
class Shard:
    """Rank r holds the range ``cut.ranges[r]`` of the last axis."""

    cut: Cut


@dataclass(frozen=True)
class Routed:
    """Rank r has the answers of the experts ``cut.ranges[r]``, and zeros in place of those of all others."""

    cut: Cut


Layout = Replicate | Partial | Shard | Routed
REPLICATE = Replicate()
PARTIAL = Partial()


def check_weights(weights: Sequence[float], n_ranks: int) -> tuple[float, ...]:
    """Return the ``-ts`` weights of the ranks, all equal if none are given.

    Raises:
        UsageError: a wrong number of weights, a negative one, or none above zero.
    """
    if not weights:
        return (1.0,) * n_ranks
    if len(weights) != n_ranks:
        raise UsageError(f"-ts names {len(weights)} shares but there are {n_ranks} ranks; give one share per rank")
    if min(weights) < 0 or max(weights) <= 0 or sum(weights) == float("inf"):
        raise UsageError(f"-ts shares must be numbers of at least 0, with one above 0; got {_join(weights)}")
    return tuple(float(w) for w in weights)


def _join(weights: Sequence[float]) -> str:
    return ",".join(f"{w:g}" for w in weights)


def apportion(n_units: int, weights: Sequence[float]) -> list[int]:
    """Divide ``n_units`` indivisible units by largest remainder; a rank with weight gets one while there are enough."""
    total = sum(weights)
    ideal = [n_units * w / total for w in weights]
    counts = [int(x) for x in ideal]
    by_remainder = sorted(range(len(weights)), key=lambda r: (counts[r] - ideal[r], r))
    for r in by_remainder[: n_units - sum(counts)]:
        counts[r] += 1
    active = [r for r, w in enumerate(weights) if w > 0]
    if n_units >= len(active):
        for r in active:
            if counts[r] == 0:
                richest = max(active, key=lambda s: (counts[s], s))
                counts[richest] -= 1
                counts[r] += 1
    return counts


def _cut_at(size: int, weights: Sequence[float], grain: int) -> Cut:
    ranges, start = [], 0
    for count in apportion(-(-size // grain), weights):
        stop = min(size, start + count * grain)
        ranges.append((start, stop))
        start = stop
    return Cut(size, tuple(ranges))


def _needlessly_empty(cut: Cut, weights: Sequence[float]) -> bool:
    active = [r for r, w in enumerate(weights) if w > 0]
    return cut.size >= len(active) and any(cut.width(r) == 0 for r in active)


def split(
    size: int, weights: Sequence[float], grains: Sequence[int] = GRAINS, tolerance: float = WIDTH_TOLERANCE
) -> Cut:
    """Cut an axis in proportion to ``weights``, on the coarsest grain whose imbalance is within ``tolerance``.

    Where no grain is, the most even cut wins (the coarser one of two that are equal). No rank with weight is left
    empty while the axis has an element for each.
    """
    cuts = [_cut_at(size, weights, grain) for grain in grains]
    cuts = [cut for cut in cuts if not _needlessly_empty(cut, weights)] or cuts[-1:]
    for cut in cuts:
        if cut.imbalance(weights) <= tolerance:
            return cut
    return min(cuts, key=lambda cut: cut.imbalance(weights))


def split_heads(n_head: int, n_head_kv: int, weights: Sequence[float]) -> tuple[Cut, Cut]:
    """Cut query heads and the KV heads that they read; returns the cuts in heads, ``(q, kv)``.

    Whole groups of query heads (all that share a KV head) where that is balanced. Else single query heads, and ranks
    whose queries fall into one group all hold its KV head: then the ranges of the KV cut overlap.
    """
    group = n_head // n_head_kv
    kv = _cut_at(n_head_kv, weights, 1)
    finer = n_head > n_head_kv
    if not finer or not (kv.imbalance(weights) > HEAD_TOLERANCE or any(a == b for a, b in kv.ranges)):
        return kv.scaled(group), kv
    q = split(n_head, weights, grains=(1,))
    covering, reached = [], 0
    for start, stop in q.ranges:
        first, last = (start // group, -(-stop // group)) if stop > start else (reached, reached)
        covering.append((first, last))
        reached = last
    return q, Cut(n_head_kv, tuple(covering))
