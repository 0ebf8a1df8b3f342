"""A backend and a group of shapes: under `Ops` they run any model text on any rank without a weight, and write a tape.

Arrays are NumPy arrays of stride 0 that own no memory of their extent; a `Buffer` stands for the memory that the real
array would take, and lives as long as an array or a view of it does. So the tape knows the most that was alive at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpillama.backends.base import AttentionParams, Batch, RawWeight
from mpillama.backends.kv_codec import check_cache_type, row_bytes
from mpillama.config import Rope
from mpillama.gguf.types import GGMLType
from mpillama.layout import Cut

_ELEMENT = 4
"""Bytes of an activation's element: float32."""


@dataclass(frozen=True)
class Event:
    """One op or collective of one rank.

    Attributes:
        part: of the model: ``embedding``, the index of a block, or ``head``.
        kind: the backend's method, or ``allreduce`` or ``allgather``.
        what: the weight's name within its block; of a collective, that of the product it completes.
        flops: multiplications and additions.
        weight_bytes: of weights and cached keys and values that are read; ``type`` says in which form.
        act_bytes: of activations read and written; of a collective, the bytes of its result.
        type: of the weights, if it is a product with a matrix.
        n_tokens: rows of the input.
    """

    part: str
    kind: str
    what: str = ""
    flops: float = 0.0
    weight_bytes: float = 0.0
    act_bytes: float = 0.0
    type: GGMLType | None = None
    n_tokens: int = 0

    @property
    def is_collective(self) -> bool:
        """Whether other ranks take part."""
        return self.kind in ("allreduce", "allgather")


@dataclass
class Tape:
    """What a rank does in a step, in order; ``peak`` is the most bytes of activations alive at once."""

    events: list[Event] = field(default_factory=list)
    part: str = "embedding"
    live: int = 0
    peak: int = 0
    peaks: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str, what: str = "", **figures: Any) -> None:
        """Write an event of the current part down."""
        self.events.append(Event(self.part, kind, what, **figures))

    @property
    def product(self) -> str:
        """The weight of the last product."""
        return next((event.what for event in reversed(self.events) if event.what and not event.is_collective), "")

    def claim(self, nbytes: int) -> None:
        """Count memory that is now in use, or with a negative number, no more."""
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        self.peaks[self.part] = max(self.peaks.get(self.part, 0), self.live)


class Buffer:
    """The memory of one activation, on a tape's account for as long as this object lives."""

    def __init__(self, tape: Tape, nbytes: int) -> None:
        self._tape, self._nbytes = tape, nbytes
        tape.claim(nbytes)

    def __del__(self) -> None:
        self._tape.claim(-self._nbytes)


class Shaped(np.ndarray):
    """An array of zeros that takes no memory; views of it share its `Buffer`."""

    buffer: Buffer | None

    def __array_finalize__(self, origin: Any) -> None:
        self.buffer = getattr(origin, "buffer", None)


def shaped(shape: Sequence[int], buffer: Buffer | None = None) -> Shaped:
    """Return float32 zeros of a shape, in 4 bytes."""
    array = np.broadcast_to(np.zeros((), np.float32), tuple(shape)).view(Shaped)
    array.buffer = buffer
    return array


@dataclass(frozen=True)
class ShapeWeight:
    """A matrix, or a stack of them, by its extent."""

    name: str
    type: GGMLType
    n_mats: int
    n_rows: int
    n_in: int
    nbytes: int


@dataclass(frozen=True)
class ShapeCache:
    """The KV cache of one block: heads that this rank holds, and the bytes of a token's keys and values in one."""

    n_head_kv: int
    token_bytes: int


class ShapeBackend:
    """Does nothing but say what a result's shape is, and write down what computing it takes."""

    name = "shapes"
    host_arrays = True

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def _out(self, shape: Sequence[int]) -> Shaped:
        return shaped(shape, Buffer(self.tape, _ELEMENT * math.prod(shape)))

    def _light(self, kind: str, result: Sequence[int], *inputs: Any, flops: float = 1.0) -> Shaped:
        """Write down an op whose cost is that of reading its inputs and writing its result."""
        n = math.prod(result)
        read = sum(x.size for x in inputs if isinstance(x, np.ndarray))
        self.tape.add(kind, flops=flops * n, act_bytes=float(_ELEMENT * (n + read)), n_tokens=result[0])
        return self._out(result)

    # -- weights -------------------------------------------------------------------------------------------------------

    def supports(self, type: GGMLType) -> bool:
        """Plan any type."""
        return True

    def weight(self, raw: RawWeight) -> ShapeWeight:
        """Take a matrix whose bytes are not there."""
        n_mats, n_rows, n_bytes = raw.raw.shape
        return ShapeWeight(raw.name, raw.type, n_mats, n_rows, raw.n_in - sum(raw.pad), n_mats * n_rows * n_bytes)

    def vector(self, raw: RawWeight) -> Shaped:
        """Take a vector whose bytes are not there."""
        return shaped((raw.raw.shape[1], raw.n_in))

    def asarray(self, x: np.ndarray) -> Shaped:
        """Take a small array."""
        return shaped(x.shape)

    def to_host(self, x: Shaped) -> np.ndarray:
        """Return it."""
        return x

    # -- products ------------------------------------------------------------------------------------------------------

    def embedding(self, tokens: np.ndarray, w: ShapeWeight, first: int) -> Shaped:
        """Look rows up."""
        n_tokens = len(tokens)
        row = w.nbytes / max(1, w.n_mats * w.n_rows)
        n_bytes = float(_ELEMENT * n_tokens * w.n_in) + row * n_tokens
        self.tape.add("embedding", "token_embd", act_bytes=n_bytes, n_tokens=n_tokens)
        return self._out((n_tokens, w.n_in))

    def linear(self, x: Shaped, w: ShapeWeight) -> Shaped:
        """Multiply by a matrix."""
        n_tokens = x.shape[0]
        self.tape.add(
            "linear",
            _within_block(w.name),
            flops=2.0 * n_tokens * w.n_rows * w.n_in,
            weight_bytes=float(w.nbytes),
            act_bytes=float(_ELEMENT * n_tokens * (w.n_rows + w.n_in)),
            type=w.type,
            n_tokens=n_tokens,
        )
        return self._out((n_tokens, w.n_rows))

    def expert_linear(self, x: Shaped, w: ShapeWeight, experts: Shaped) -> Shaped:
        """Multiply by the experts' matrices: those are read that a token chose, evenly and independently of others."""
        n_tokens, n_used = experts.shape
        touched = w.n_mats * (1.0 - (1.0 - n_used / max(1, w.n_mats)) ** n_tokens)
        self.tape.add(
            "expert_linear",
            _within_block(w.name),
            flops=2.0 * n_tokens * n_used * w.n_rows * w.n_in,
            weight_bytes=w.nbytes * touched / max(1, w.n_mats),
            act_bytes=float(_ELEMENT * n_tokens * n_used * (w.n_rows + w.n_in)),
            type=w.type,
            n_tokens=n_tokens,
        )
        return self._out((n_tokens, n_used, w.n_rows))

    # -- everything else -----------------------------------------------------------------------------------------------

    def take(self, table: Shaped, index: Shaped) -> Shaped:
        """Choose rows of a table."""
        return self._light("take", (*index.shape, *table.shape[1:]))

    def add_taken(self, x: Shaped, table: Shaped, index: Shaped) -> Shaped:
        """Add rows of a table."""
        return self._light("add_taken", x.shape, x)

    def rows(self, x: Shaped, index: np.ndarray) -> Shaped:
        """Keep tokens."""
        return self._light("rows", (len(index), *x.shape[1:]))

    def add(self, a: Shaped, b: Shaped) -> Shaped:
        """Add."""
        return self._light("add", np.broadcast_shapes(a.shape, b.shape), a, b)

    def mul(self, a: Shaped, b: Shaped | float) -> Shaped:
        """Multiply."""
        return self._light("mul", np.broadcast_shapes(a.shape, getattr(b, "shape", ())), a, b)

    def sum_experts(self, x: Shaped, weights: Shaped) -> Shaped:
        """Sum over experts."""
        return self._light("sum_experts", (x.shape[0], x.shape[2]), x, flops=2.0 * x.shape[1])

    def rms_norm(self, x: Shaped, w: Shaped, eps: float) -> Shaped:
        """Norm."""
        return self._light("rms_norm", x.shape, x, flops=4.0)

    def sum_squares(self, x: Shaped, start: int, stop: int) -> Shaped:
        """Sum squares."""
        return self._light("sum_squares", (x.shape[0], 1), x)

    def scale_by_mean_square(self, x: Shaped, mean_square: Shaped, w: Shaped, eps: float) -> Shaped:
        """Scale by a mean."""
        return self._light("scale_by_mean_square", x.shape, x, flops=2.0)

    def gated(self, activation: str, gate: Shaped, up: Shaped) -> Shaped:
        """Gate."""
        return self._light("gated", gate.shape, gate, up, flops=8.0)

    def sigmoid(self, x: Shaped) -> Shaped:
        """Logistic function."""
        return self._light("sigmoid", x.shape, x, flops=6.0)

    def softcap(self, x: Shaped, cap: float) -> Shaped:
        """Cap."""
        return self._light("softcap", x.shape, x, flops=8.0)

    def route(self, logits: Shaped, n_used: int, gating: str, normalize: bool) -> tuple[Shaped, Shaped]:
        """Choose experts."""
        shape = (logits.shape[0], n_used)
        return self._light("route", shape, logits, flops=logits.shape[1]), self._out(shape)

    def held(self, index: Shaped, start: int, stop: int) -> Shaped:
        """Tell a rank's experts from those of others."""
        return self._light("held", index.shape, index)

    def as_numbers(self, index: Shaped) -> Shaped:
        """Make numbers of indices."""
        return self._light("as_numbers", index.shape, index)

    def as_index(self, x: Shaped) -> Shaped:
        """Make indices of numbers."""
        return self._light("as_index", x.shape, x)

    def top_k(self, x: Shaped, k: int, first: int) -> Shaped:
        """Find the largest of each row."""
        return self._light("top_k", (x.shape[0], 2 * k), x)

    def merge_top_k(self, x: Shaped, k: int) -> Shaped:
        """Merge what ranks have found."""
        return self._light("merge_top_k", (x.shape[0], 2 * k), x)

    def attn_temperature(self, positions: np.ndarray, span: float, scale: float) -> Shaped:
        """Make factors of positions."""
        return self._light("attn_temperature", (len(positions), 1))

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: Shaped | None) -> Buffer:
        """Prepare rotations."""
        self.tape.add("rope_table", flops=16.0 * len(positions) * rope.n_rot, n_tokens=len(positions))
        return Buffer(self.tape, _ELEMENT * len(positions) * rope.n_rot)

    def rope(self, x: Shaped, table: Buffer) -> Shaped:
        """Rotate."""
        return self._light("rope", x.shape, x, flops=3.0)

    def copy_blocks(self, cache: ShapeCache, copies: np.ndarray) -> None:
        """Do nothing: a cache of shapes has no content."""

    def read_blocks(self, cache: ShapeCache, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Never called: a cache of shapes has no content."""
        raise AssertionError("a cache of shapes has no content")

    def write_blocks(self, cache: ShapeCache, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Never called: a cache of shapes has no content."""
        raise AssertionError("a cache of shapes has no content")

    def new_cache(self, n_blocks: int, n_head_kv: int, n_k: int, n_v: int, type_k: str, type_v: str) -> ShapeCache:
        """Return what a token takes in the KV cache of one block of the model; room for tokens is not reserved."""
        check_cache_type("keys", type_k, n_k)
        check_cache_type("values", type_v, n_v)
        return ShapeCache(n_head_kv, row_bytes(type_k, n_k) + row_bytes(type_v, n_v))

    def attention(
        self,
        q: Shaped,
        k: Shaped,
        v: Shaped,
        cache: ShapeCache,
        batch: Batch,
        params: AttentionParams,
        sinks: Shaped | None,
    ) -> Shaped:
        """Attend: reads each sequence's keys and values once, and multiplies them with every query that sees them."""
        n_tokens, n_head, n_k = q.shape
        n_v = v.shape[2]
        seen = batch.positions.astype(np.int64) + 1
        last = seen[np.cumsum(batch.seq_lens) - 1]
        if params.window:
            reached = last - (seen[np.cumsum(batch.seq_lens) - batch.seq_lens] - params.window).clip(0)
            seen = np.minimum(seen, params.window)
            last = np.minimum(last, reached)
        self.tape.add(
            "attention",
            flops=2.0 * float(seen.sum()) * n_head * (n_k + n_v),
            weight_bytes=float(last.sum()) * cache.n_head_kv * cache.token_bytes,
            act_bytes=float(_ELEMENT * n_tokens * (n_head * (n_k + n_v) + k.size // n_tokens + v.size // n_tokens)),
            n_tokens=n_tokens,
        )
        return self._out((n_tokens, n_head, n_v))


class ShapeGroup:
    """One rank of a group of ``size``: collectives are written down; the result has the right shape."""

    def __init__(self, tape: Tape, rank: int, size: int) -> None:
        self.tape, self.rank, self.size = tape, rank, size
        self._ranks = range(size)

    @property
    def leader(self) -> bool:
        """Whether this is the first rank."""
        return self.rank == self._ranks[0]

    def allreduce(self, x: np.ndarray) -> np.ndarray:
        """Sum over the ranks, in place."""
        self.tape.add("allreduce", self.tape.product, act_bytes=float(_ELEMENT * x.size), n_tokens=x.shape[0])
        return x

    def allgather(self, x: np.ndarray, cut: Cut) -> np.ndarray:
        """Join slices."""
        shape = (*x.shape[:-1], cut.size)
        self.tape.add("allgather", self.tape.product, act_bytes=float(_ELEMENT * math.prod(shape)), n_tokens=x.shape[0])
        return shaped(shape, Buffer(self.tape, _ELEMENT * math.prod(shape)))


def _within_block(name: str) -> str:
    return name.removesuffix(".weight").split(".", 2)[-1] if name.startswith("blk.") else name.removesuffix(".weight")
