"""The ops protocol: what a device must be able to do. A backend knows arrays and kernels, and nothing of other ranks.

Legend of shape suffixes: T tokens of the step, S sequences, N width of an activation, H query heads, G KV heads, D
elements of a head, E experts, K experts chosen for a token, V vocabulary. Activations are float32, contiguous, tokens
first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np

from mpillama.config import Rope
from mpillama.gguf.types import GGMLType

# An array of the backend (numpy.ndarray, cupy.ndarray …), and a weight or cache in whatever form it keeps them.
Array = Any
Handle = Any

KV_BLOCK = 32
"""Tokens in one block of the KV cache."""


@dataclass(frozen=True)
class RawWeight:
    """A rank's slice of a tensor as the file has it.

    Attributes:
        raw: uint8 (n_mats, n_rows, row bytes); the backend may keep it.
        n_in: elements of a row, pads included.
        pad: elements before and after the rank's own range of the in axis, to be met with zeros.
    """

    name: str
    type: GGMLType
    raw: np.ndarray
    n_in: int
    pad: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Batch:
    """The tokens of one step, sequence after sequence.

    Attributes:
        tokens: int32 (T,).
        positions: int32 (T,), consecutive within a sequence.
        seq_lens: int32 (S,), tokens of each sequence in this step.
        block_tables: int32 (S, B), the KV blocks of each sequence in order of position, -1 where it has none.
        logit_rows: int32 (L,), the tokens whose logits are wanted.
        copies: int32 (C, 2), KV blocks to copy before the step, source and destination. No block is both, and no
            destination is named twice, so they can be made in any order.
        embedding: whether the final hidden states of ``logit_rows`` are wanted in place of their logits.
        n_top: how many of the largest logits are wanted, as `Backend.top_k` gives them; 0: all.
    """

    tokens: np.ndarray
    positions: np.ndarray
    seq_lens: np.ndarray
    block_tables: np.ndarray
    logit_rows: np.ndarray
    copies: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    embedding: bool = False
    n_top: int = 0


@dataclass(frozen=True)
class AttentionParams:
    """What is fixed for the attention of one block.

    Attributes:
        scale: factor on q.k.
        softcap: scores become softcap * tanh(score / softcap); 0: no cap.
        window: a token sees itself and the window - 1 tokens before it; 0: all before it.
        kv_heads: for each local query head, the local KV head that it reads.
    """

    scale: float
    softcap: float
    window: int
    kv_heads: tuple[int, ...]


@dataclass(frozen=True)
class HeadNorms:
    """Weights (D,) of the norms of each head of q and of k, and what is added to their mean squares."""

    q: Array
    k: Array
    eps: float


class Backend(Protocol):
    """One device of one rank.

    Attributes:
        name: as the user calls it.
        host_arrays: its arrays are those of NumPy, which any group of ranks can join.
    """

    name: str
    host_arrays: bool

    def supports(self, type: GGMLType) -> bool:
        """Whether weights of this type can be used."""
        ...

    def weight(self, raw: RawWeight) -> Handle:
        """Take a matrix, or a stack of matrices, for `linear`, `expert_linear` and `embedding`."""
        ...

    def vector(self, raw: RawWeight) -> Array:
        """Return a norm weight, scale or bias as float32 (rows, n); only the biases of experts have several rows."""
        ...

    def asarray(self, x: np.ndarray) -> Array:
        """Bring a small host array over."""
        ...

    def to_host(self, x: Array) -> np.ndarray:
        """Return a host array, float32."""
        ...

    def embedding(self, tokens: np.ndarray, w: Handle, first: int) -> Array:
        """Return rows ``tokens - first`` of ``w``, (T, N); zeros for tokens whose row is not here."""
        ...

    def linear(self, x: Array, w: Handle) -> Array:
        """Return x W^T for x (T, n_in without pads); result (T, n_rows)."""
        ...

    def expert_linear(self, x: Array, w: Handle, experts: Array) -> Array:
        """Return, for each token and chosen expert, x times that expert's matrix.

        Args:
            x: (T, n_in) the same for all experts, or (T, K, n_in).
            w: a stack of E matrices.
            experts: int (T, K); the result is zero where one is negative.

        Returns:
            (T, K, n_rows)
        """
        ...

    def take(self, table: Array, index: Array) -> Array:
        """Return ``table[index]`` along the first axis."""
        ...

    def add_taken(self, x: Array, table: Array, index: Array) -> Array:
        """Return x + table[index], and x where the index is negative."""
        ...

    def rows(self, x: Array, index: np.ndarray) -> Array:
        """Return these rows of x."""
        ...

    def add(self, a: Array, b: Array) -> Array:
        """Return a + b, broadcasting."""
        ...

    def mul(self, a: Array, b: Array | float) -> Array:
        """Return a * b, broadcasting."""
        ...

    def sum_experts(self, x: Array, weights: Array) -> Array:
        """Return the sum over K of weights (T, K) times x (T, K, N)."""
        ...

    def rms_norm(self, x: Array, w: Array, eps: float) -> Array:
        """Return x / rms(x) * w over the last axis (arXiv:1910.07467)."""
        ...

    def sum_squares(self, x: Array, start: int, stop: int) -> Array:
        """Return the sum of squares of elements [start, stop) of the last axis, (T, 1)."""
        ...

    def scale_by_mean_square(self, x: Array, mean_square: Array, w: Array, eps: float) -> Array:
        """Return x / sqrt(mean_square + eps) * w: the second half of a norm whose first half spans ranks."""
        ...

    def gated(self, activation: str, gate: Array, up: Array) -> Array:
        """Return act(gate) * up for ``silu``, ``gelu`` or ``swiglu_oai``."""
        ...

    def sigmoid(self, x: Array) -> Array:
        """Return the logistic function."""
        ...

    def softcap(self, x: Array, cap: float) -> Array:
        """Return cap * tanh(x / cap)."""
        ...

    def route(self, logits: Array, n_used: int, gating: str, normalize: bool) -> tuple[Array, Array]:
        """Choose experts: logits (T, E) to indices (T, K) and weights (T, K).

        ``gating`` is ``softmax`` (over all experts, before choosing) or ``softmax_weight`` (over the chosen logits).
        """
        ...

    def held(self, index: Array, start: int, stop: int) -> Array:
        """Return index - start where that is one of a rank's experts start to stop, and -1 for those of others."""
        ...

    def as_numbers(self, index: Array) -> Array:
        """Return indices as float32, which collectives take; exact below 2^24."""
        ...

    def as_index(self, x: Array) -> Array:
        """Return what `as_numbers` was given."""
        ...

    def top_k(self, x: Array, k: int, first: int) -> Array:
        """Return the largest k of each row of x (L, V), largest first, among equals the first: (L, 2 k).

        A row has the k values, then their columns, counted from ``first``, as numbers. NaN counts as the largest; -inf
        does not count, and stands with column -1 where nothing else is left. Columns are below 2^24.
        """
        ...

    def merge_top_k(self, x: Array, k: int) -> Array:
        """Return the same, (L, 2 k), from several such results side by side, (L, P * 2 k)."""
        ...

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: Array | None) -> Handle:
        """Prepare the rotations of a step's tokens."""
        ...

    def attn_temperature(self, positions: np.ndarray, span: float, scale: float) -> Array:
        """Return log(floor(position / span) + 1) * scale + 1, (T, 1): Llama 4's factor on queries at long range."""
        ...

    def rope(self, x: Array, table: Handle) -> Array:
        """Rotate heads x (T, H, D)."""
        ...

    def new_cache(self, n_blocks: int, n_head_kv: int, n_k: int, n_v: int, type_k: str, type_v: str) -> Handle:
        """Allocate the KV cache of one block of the model, for n_blocks * KV_BLOCK tokens (f32, f16, bf16)."""
        ...

    def copy_blocks(self, cache: Handle, copies: np.ndarray) -> None:
        """Copy blocks of keys and values within a cache, as they are stored; see `Batch.copies`."""
        ...

    def read_blocks(self, cache: Handle, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return what blocks hold as numbers in host memory, float32 (blocks, KV_BLOCK, G, D) and (…, Dv).

        `write_blocks` of these numbers restores the blocks exactly, whatever the cache's type.
        """
        ...

    def write_blocks(self, cache: Handle, blocks: np.ndarray, k: np.ndarray, v: np.ndarray) -> None:
        """Put keys and values into whole blocks."""
        ...

    def attention(
        self, q: Array, k: Array, v: Array, cache: Handle, batch: Batch, params: AttentionParams, sinks: Array | None
    ) -> Array:
        """Store k and v of the step's tokens, then attend causally.

        Args:
            q: (T, H, D).
            k: (T, G, D).
            v: (T, G, Dv).
            cache: of this block.
            batch: positions and KV blocks.
            params: scale, window and head map.
            sinks: (H,) logits that take part in each softmax without a value, or None.

        Returns:
            (T, H, Dv)
        """
        ...


class Stepper(Protocol):
    """Runs the steps of a model."""

    def __call__(self, batch: Batch, residual: np.ndarray | None) -> Array:
        """Return what a batch comes to, given the residual that an earlier stage has left; good until the next one."""
        ...


class Stepping(Backend, Protocol):
    """A backend that wants to know where a step begins, to do more of it at once."""

    def stepper(self, ops: Any, work: Callable[[Batch, Array | None], Array], capture: bool) -> Stepper:
        """Return what runs steps by means of ``work``, which depends on nothing but its arguments and ``ops``.

        With ``capture``, ``work`` may be recorded where its ops allow that, and not be called for later batches.

        Args:
            ops: the `Ops` over this backend.
            work: runs a batch, with the residual that an earlier stage has left or None.
            capture: whether to record.
        """
        ...


ROW_UNIT = 16
"""Rows of a matrix that a `Filling` backend wants together."""


@runtime_checkable
class Filling(Backend, Protocol):
    """A backend that lays weights out in another way than the file does, while they come."""

    def new_weight(self, type: GGMLType, n_mats: int, n_rows: int, n_in: int, pad: tuple[int, int]) -> Handle:
        """Return a stack of matrices that can be used once all of its rows are there; see `RawWeight`."""
        ...

    def fill(self, w: Handle, first: int, rows: np.ndarray) -> None:
        """Put rows into a new weight; nothing of the arguments is kept.

        Args:
            w: from `new_weight`.
            first: number of the first row, counted through all matrices.
            rows: uint8 (n, row bytes), whole blocks of the type. They begin at a multiple of `ROW_UNIT` in a matrix,
                and end there or at the end of a matrix.

        Raises:
            ValueError: they do not.
        """
        ...


class Fusing(Backend, Protocol):
    """What a backend may do in one go, where each op by itself takes longer to ask for than to do.

    `Ops` uses it if the backend has all of it; `attention` then takes a rope table too, and rotates q and k first.
    """

    def linears(self, x: Array, ws: Sequence[Handle]) -> list[Array]:
        """Return `linear` of each of several matrices."""
        ...

    def gated_linear(self, activation: str, x: Array, gate: Handle, up: Handle) -> Array:
        """Return `gated` of the two `linear`."""
        ...


class Joining(Fusing, Protocol):
    """What a device may do in one go whose ops take less time than it takes to start them.

    `Ops` uses it if the backend has all of it. `attention` then takes, after the rope table, `HeadNorms` and biases
    of q, k and v, each as wide as all heads or None: biases are added first, then heads are normed, then rotated.
    """

    def route(
        self, logits: Array, n_used: int, gating: str, normalize: bool, bias: Array | None = None
    ) -> tuple[Array, Array]:
        """Choose experts by logits + bias; see `Backend.route`."""
        ...

    def gated(self, activation: str, gate: Array, up: Array, biases: tuple[Array, Array, Array] | None = None) -> Array:
        """Return act(gate) * up; ``biases``: two tables and an index, as for `add_taken`, to add to gate and up."""
        ...

    def add_norm(
        self,
        h: Array,
        x: Array,
        w: Array,
        eps: float,
        post: Array | None = None,
        factor: float = 1.0,
        weights: Array | None = None,
        bias: Array | None = None,
        index: Array | None = None,
    ) -> tuple[Array, Array]:
        """Return h + x, and the `rms_norm` of that by ``w``; both (T, N).

        Args:
            h: (T, N).
            x: (T, N), or with ``weights`` (T, K, N): then `sum_experts` of it is meant.
            w: (N,).
            eps: of both norms.
            post: (N,): x is normed by it first.
            factor: on x, after that.
            weights: (T, K).
            bias: what to add to x before all else: (N,), or with ``index`` (T, K) a table, as for `add_taken`.
            index: of rows of the table.
        """
        ...
