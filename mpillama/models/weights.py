"""Weights by GGUF name, for the whole model and for one block."""

from __future__ import annotations

from collections.abc import Mapping

from mpillama.ops import Ops, Value, Weight


class Weights:
    """The matrices and vectors of a model, or of the block that ``prefix`` names."""

    def __init__(self, matrices: Mapping[str, Weight], vectors: Mapping[str, Value], prefix: str = "") -> None:
        self._matrices, self._vectors, self._prefix = matrices, vectors, prefix

    def block(self, il: int) -> Weights:
        """Return the weights of block ``il``, by their names within it."""
        return Weights(self._matrices, self._vectors, f"blk.{il}.")

    def matrix(self, name: str) -> Weight:
        """Return the matrix, or stack of matrices, ``name.weight``."""
        return self._matrices[f"{self._prefix}{name}.weight"]

    def vector(self, name: str) -> Value:
        """Return the vector ``name`` (with its suffix)."""
        return self._vectors[self._prefix + name]

    def optional(self, name: str) -> Value | None:
        """Return the vector ``name``, or None if the model has none."""
        return self._vectors.get(self._prefix + name)


def project(ops: Ops, x: Value, w: Weights, name: str) -> Value:
    """Multiply by ``name``, then by its scale, then add its bias, as far as it has them."""
    y = ops.linear(x, w.matrix(name))
    scale, bias = w.optional(f"{name}.scale"), w.optional(f"{name}.bias")
    y = ops.scale(y, scale) if scale else y
    return ops.add(y, bias) if bias else y
