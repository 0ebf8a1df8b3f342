"""Weights by GGUF name, for the whole model and for one block."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TypeVar

from mpillama.ops import Ops
from mpillama.values import Value, Weight

T = TypeVar("T")


class Weights:
    """The matrices and vectors of a model, or of one block.

    Every op of every step asks for some: names are cut up once.
    """

    def __init__(self, matrices: Mapping[str, Weight], vectors: Mapping[str, Value]) -> None:
        self._matrices = {name.removesuffix(".weight"): weight for name, weight in matrices.items()}
        self._vectors = vectors
        self._blocks: dict[str, Weights] | None = None
        self._scales_and_biases: dict[str, tuple[Value | None, Value | None]] = {}

    def block(self, il: int) -> Weights:
        """Return the weights of block ``il``, by their names within it."""
        if self._blocks is None:
            matrices, vectors = _by_block(self._matrices), _by_block(self._vectors)
            self._blocks = {i: Weights(matrices[i], vectors[i]) for i in {*matrices, *vectors}}
        return self._blocks[str(il)]

    def matrix(self, name: str) -> Weight:
        """Return the matrix, or stack of matrices, ``name.weight``."""
        return self._matrices[name]

    def vector(self, name: str) -> Value:
        """Return the vector ``name`` (with its suffix)."""
        return self._vectors[name]

    def optional(self, name: str) -> Value | None:
        """Return the vector ``name``, or None if the model has none."""
        return self._vectors.get(name)

    def scale_and_bias(self, name: str) -> tuple[Value | None, Value | None]:
        """Return the scale and the bias of the matrix ``name``, None for what it does not have."""
        both = self._scales_and_biases.get(name)
        if both is None:
            both = self._scales_and_biases[name] = self.optional(f"{name}.scale"), self.optional(f"{name}.bias")
        return both

    def is_plain(self, name: str) -> bool:
        """Whether the matrix ``name`` has neither a bias nor a scale."""
        return self.scale_and_bias(name) == (None, None)


def _by_block(named: Mapping[str, T]) -> dict[str, dict[str, T]]:
    """Return what belongs to blocks, by block and by name within it."""
    found: dict[str, dict[str, T]] = defaultdict(dict)
    for name, item in named.items():
        if name.startswith("blk."):
            _, il, rest = name.split(".", 2)
            found[il][rest] = item
    return found


def project(ops: Ops, x: Value, w: Weights, name: str) -> Value:
    """Multiply by ``name``, then by its scale, then add its bias, as far as it has them."""
    return _finish(ops, ops.linear(x, w.matrix(name)), w, name)


def projects(ops: Ops, x: Value, w: Weights, *names: str) -> list[Value]:
    """Return `project` of each of several matrices."""
    ys = ops.linears(x, [w.matrix(name) for name in names])
    return [_finish(ops, y, w, name) for y, name in zip(ys, names, strict=True)]


def _finish(ops: Ops, y: Value, w: Weights, name: str) -> Value:
    scale, bias = w.scale_and_bias(name)
    y = ops.scale(y, scale) if scale else y
    return ops.bias(y, bias) if bias else y
