"""What the ops of a model text take and give: arrays of a rank, and how they lie over the ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

from mpillama.backends.base import Array, Handle
from mpillama.layout import REPLICATE, Cut, Layout, Shard


@dataclass
class Value:
    """An activation, or a norm weight, bias or scale: the rank's array, and how it lies over the ranks."""

    data: Array
    layout: Layout = REPLICATE


class Biased(Value):
    """A value and a bias, which are added when somebody looks at ``data``; an op may take them as they are before.

    Args:
        x: without the bias, of any layout.
        bias: (N,), or with ``index`` a table of such.
        index: of the row of the table that belongs to each row of x, or None.
        total: adds the two.
    """

    def __init__(self, x: Value, bias: Array, index: Array | None, total: Callable[[], Array]) -> None:
        self.layout = x.layout
        self.parts: tuple[Array, Array | None, Array | None] = x.data, bias, index
        self._total = total

    @property
    def data(self) -> Array:
        """The sum."""
        if self.parts[1] is not None:
            self.parts = self._total(), None, None
        return self.parts[0]

    @data.setter
    def data(self, data: Array) -> None:
        self.parts = data, None, None


def parts(x: Value) -> tuple[Array, Array | None, Array | None]:
    """Return a value's array, and the bias that is still to be added to it, with the index into that, or None."""
    return x.parts if isinstance(x, Biased) else (x.data, None, None)


@dataclass(frozen=True)
class Weight:
    """A matrix or a stack of them, cut along ``axis`` by ``cut``: ``out``, ``in``, ``expert``, or "" (replicated)."""

    name: str
    handle: Handle
    axis: str = ""
    cut: Cut | None = None

    @cached_property
    def shard(self) -> Shard:
        """How values lie over the ranks that are cut as it is."""
        return Shard(some(self.cut))


@dataclass(frozen=True)
class Experts:
    """The experts chosen for each token and the weights of their answers, both (T, K), the same on every rank."""

    index: Array
    weights: Array
    held: dict[Cut, Array] = field(default_factory=dict, compare=False)
    """See `Ops._held`."""


@dataclass(frozen=True)
class Branch:
    """What a block adds to the residual: x, its norm if there is a weight for one, times a factor.

    With ``experts``, x is (T, K, N), and the sum of these by the experts' weights is meant.
    """

    x: Value
    norm: Value | None = None
    factor: float = 1.0
    experts: Experts | None = None


def some(cut: Cut | None) -> Cut:
    """Return the cut of an axis that is cut."""
    if cut is None:
        raise AssertionError("a cut axis without a cut")
    return cut
