"""Weights by GGUF name, for the whole model and for one block."""

from __future__ import annotations

from collections.abc import Mapping

from mpillama.ops import Ops, Value, Weight


class Weights:
    """The matrices and vectors of a model, or of the block that ``prefix`` names."""

    def __init__(self, matrices: Mapping[str, Weight], vectors: Mapping[str, Value], prefix: str = "") -> None:
        self._matrices, self._vectors, self._prefix = matrices, vectors, prefix
        self._blocks: dict[int, Weights] = {}

    def block(self, il: int) -> Weights:
        """Return the weights of block ``il``, by their names within it."""
        block = self._blocks.get(il)
        if block is None:
            block = self._blocks[il] = Weights(self._matrices, self._vectors, f"blk.{il}.")
        return block

    def matrix(self, name: str) -> Weight:
        """Return the matrix, or stack of matrices, ``name.weight``."""
        return self._matrices[f"{self._prefix}{name}.weight"]

    def vector(self, name: str) -> Value:
        """Return the vector ``name`` (with its suffix)."""
        return self._vectors[self._prefix + name]

    def optional(self, name: str) -> Value | None:
        """Return the vector ``name``, or None if the model has none."""
        return self._vectors.get(self._prefix + name)

    def is_plain(self, name: str) -> bool:
        """Whether the matrix ``name`` has neither a bias nor a scale."""
        return self.optional(f"{name}.bias") is None and self.optional(f"{name}.scale") is None


def project(ops: Ops, x: Value, w: Weights, name: str) -> Value:
    """Multiply by ``name``, then by its scale, then add its bias, as far as it has them."""
    return _finish(ops, ops.linear(x, w.matrix(name)), w, name)


def projects(ops: Ops, x: Value, w: Weights, *names: str) -> list[Value]:
    """Return `project` of each of several matrices."""
    ys = ops.linears(x, [w.matrix(name) for name in names])
    return [_finish(ops, y, w, name) for y, name in zip(ys, names, strict=True)]


def _finish(ops: Ops, y: Value, w: Weights, name: str) -> Value:
    scale, bias = w.optional(f"{name}.scale"), w.optional(f"{name}.bias")
    y = ops.scale(y, scale) if scale else y
    return ops.add(y, bias) if bias else y
