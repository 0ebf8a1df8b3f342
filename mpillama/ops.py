"""Ops that carry layouts: each runs on the rank's own arrays and infers how its result lies over the ranks.

A collective is put in only where one is needed, and only here: an op that is not linear in its input makes a partial
sum whole first (`Ops.whole`), a norm over a cut axis reduces one number per token, and `Ops.gather` joins the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any, cast

import numpy as np

from mpillama.backends.base import Array, AttentionParams, Backend, Batch, Fusing, Handle, HeadNorms, Joining
from mpillama.comm.base import Group
from mpillama.config import Rope
from mpillama.layout import PARTIAL, REPLICATE, Cut, Layout, Partial, Replicate, Routed, Shard
from mpillama.notes import NotedGroup, Notes
from mpillama.values import Biased, Branch, Experts, Value, Weight, parts, some


class Ops:
    """The ops of a model text, over one backend and one group.

    Args:
        backend: of this rank.
        group: of the ranks that share the weights.
        alike: whether all of them compute the same bits from the same input. Where they do not, what each works out for
            itself is as good as the others', but a choice between experts has to be one for all, and so has the result.
    """

    def __init__(self, backend: Backend, group: Group, alike: bool = True) -> None:
        self.backend, self._group, self._alike = backend, group, alike
        fuses = hasattr(backend, "linears") and hasattr(backend, "gated_linear")
        self._fusing = cast(Fusing, backend) if fuses else None
        joins = fuses and hasattr(backend, "add_norm")
        self._joining = cast(Joining, backend) if joins else None

    @property
    def capturable(self) -> bool:
        """Whether all that crosses ranks is work of the device, which it can record: nothing that one tells others."""
        return self._alike and bool(getattr(self._group, "capturable", False))

    @contextmanager
    def recorded_by(self, backend: Any, tape: Notes) -> Iterator[None]:
        """Let ``backend``, which has all ops, do the work meanwhile, and tell ``tape`` of collectives."""
        own = self.backend, self._fusing, self._joining, self._group
        self.backend, self._fusing = backend, backend if self._fusing else None
        self._joining = backend if self._joining else None
        if self._group.size > 1:
            self._group = NotedGroup(self._group, tape)
        try:
            yield
        finally:
            self.backend, self._fusing, self._joining, self._group = own

    @property
    def alike(self) -> bool:
        """Whether all ranks compute the same bits from the same input."""
        return self._alike

    # -- layouts ---------------------------------------------------------------------------------------------------

    def whole(self, x: Value) -> Array:
        """Return the array of a value that must be the same everywhere; a partial sum is reduced once, and stays so."""
        if isinstance(x.layout, Partial):
            x.data, x.layout = self._group.allreduce(x.data), REPLICATE
        if not isinstance(x.layout, Replicate):
            raise AssertionError(f"a value cut by {x.layout} was used where a whole one is needed")
        return x.data

    def gather(self, x: Value) -> Value:
        """Return the value whole: shards are joined, partial sums reduced."""
        if isinstance(x.layout, Shard):
            return Value(self._group.allgather(x.data, x.layout.cut))
        if isinstance(x.layout, Replicate) and not self._alike:
            return Value(self._leaders(x.data))
        return Value(self.whole(x))

    def top(self, x: Value, k: int) -> Value:
        """Return the k largest of each row, (L, 2 k), whole; see `Backend.top_k`. Only these travel."""
        if not isinstance(x.layout, Shard):
            return self.gather(Value(self.backend.top_k(self.whole(x), k, 0)))
        cut, n_ranks = x.layout.cut, self._group.size
        mine = self.backend.top_k(x.data, k, cut.ranges[self._group.rank][0])
        if n_ranks == 1:
            return Value(mine)
        return Value(self.backend.merge_top_k(self._group.allgather(mine, _side_by_side(2 * k, n_ranks)), k))

    def _leaders(self, x: Array) -> Array:
        """Return the first rank's float32 array on all ranks."""
        return self._group.allreduce(x if self._group.leader else self.backend.asarray(np.zeros(x.shape, np.float32)))

    def _elementwise(self, x: Value) -> Layout:
        if isinstance(x.layout, Partial):
            self.whole(x)
        return x.layout

    def _pair(self, a: Value, b: Value) -> Layout:
        """Return the common layout of two values of the same extent."""
        layout = self._elementwise(a)
        if self._elementwise(b) != layout:
            raise AssertionError(f"layouts {layout} and {b.layout} do not fit together")
        return layout

    # -- linear ----------------------------------------------------------------------------------------------------

    def embedding(self, tokens: np.ndarray, w: Weight) -> Value:
        """Look tokens up; where the rows are cut, each rank finds its own and the sum has all."""
        first = w.cut.ranges[self._group.rank][0] if w.cut else 0
        return Value(self.backend.embedding(tokens, w.handle, first), PARTIAL if w.cut else REPLICATE)

    def _linear_layout(self, x: Value, w: Weight) -> Layout:
        if w.axis == "in":
            if x.layout != w.shard:
                raise AssertionError(f"{w.name} is cut by {w.cut} but its input by {x.layout}")
            return PARTIAL
        self.whole(x)
        return w.shard if w.axis == "out" else REPLICATE

    def linear(self, x: Value, w: Weight) -> Value:
        """Multiply by a matrix."""
        layout = self._linear_layout(x, w)
        return Value(self.backend.linear(x.data, w.handle), layout)

    def linears(self, x: Value, ws: Sequence[Weight]) -> list[Value]:
        """Multiply by each of several matrices."""
        layouts = [self._linear_layout(x, w) for w in ws]
        if self._fusing:
            arrays = self._fusing.linears(x.data, [w.handle for w in ws])
        else:
            arrays = [self.backend.linear(x.data, w.handle) for w in ws]
        return [Value(data, layout) for data, layout in zip(arrays, layouts, strict=True)]

    def gated_linear(self, activation: str, x: Value, gate: Weight, up: Weight) -> Value:
        """Return act(x times gate) * (x times up)."""
        layout = self._linear_layout(x, gate)
        if not self._fusing or layout == PARTIAL or self._linear_layout(x, up) != layout:
            return self.gated(activation, self.linear(x, gate), self.linear(x, up))
        return Value(self._fusing.gated_linear(activation, x.data, gate.handle, up.handle), layout)

    def add(self, a: Value, b: Value) -> Value:
        """Add; what is whole joins a partial sum on one rank only."""
        if isinstance(a.layout, Partial) != isinstance(b.layout, Partial):
            partial, whole = (a, b) if isinstance(a.layout, Partial) else (b, a)
            self.whole(whole)
            return Value(self.backend.add(a.data, b.data) if self._group.leader else partial.data, PARTIAL)
        if a.layout != b.layout:
            raise AssertionError(f"cannot add a value cut by {a.layout} and one cut by {b.layout}")
        return Value(self.backend.add(a.data, b.data), a.layout)

    def bias(self, x: Value, bias: Value) -> Value:
        """Add a bias, now or in the op that takes the result."""
        if self._joining is None or not self._joins(x, bias):
            return self.add(x, bias)
        return Biased(x, bias.data, None, partial(self.backend.add, x.data, bias.data))

    def _joins(self, x: Value, bias: Value) -> bool:
        """Whether a bias can be added to what each rank has."""
        alone = self._group.size == 1 and isinstance(bias.layout, Replicate)
        return x.layout == bias.layout or (alone and isinstance(x.layout, Partial))

    def scale(self, x: Value, factor: float | Value) -> Value:
        """Multiply by a number, by a replicated scale of one element, or by one number for each token."""
        if isinstance(factor, Value):
            return Value(self.backend.mul(x.data, self.whole(factor)), x.layout)
        return x if factor == 1.0 else Value(self.backend.mul(x.data, factor), x.layout)

    def rows(self, x: Value, index: np.ndarray) -> Value:
        """Keep these tokens."""
        return Value(self.backend.rows(x.data, index), x.layout)

    # -- not linear ------------------------------------------------------------------------------------------------

    def norm(self, x: Value, w: Value, eps: float) -> Value:
        """RMS norm over the whole width, also where the width is cut."""
        if not isinstance(x.layout, Shard):
            return Value(self.backend.rms_norm(self.whole(x), w.data, eps))
        cut, rank = x.layout.cut, self._group.rank
        start, stop = (edge - cut.ranges[rank][0] for edge in cut.owned[rank])
        total = self._group.allreduce(self.backend.sum_squares(x.data, start, stop))
        mean = self.backend.mul(total, 1.0 / cut.size)
        return Value(self.backend.scale_by_mean_square(x.data, mean, w.data, eps), x.layout)

    def join(self, h: Value, branch: Branch, eps: float) -> Value:
        """Add a branch to the residual."""
        x = self.expert_sum(branch.x, branch.experts) if branch.experts else branch.x
        x = self.norm(x, branch.norm, eps) if branch.norm else x
        return self.add(h, self.scale(x, branch.factor))

    def join_norm(self, h: Value, branch: Branch, w: Value, eps: float) -> tuple[Value, Value]:
        """Add a branch to the residual; returns that, and its norm.

        A partial sum is made whole before, so that the residual stays what each rank has of it.
        """
        self.whole(h)
        if self._group.size > 1 or self._joining is None:
            if branch.experts:
                branch = replace(branch, x=self.expert_sum(branch.x, branch.experts), experts=None)
            self.whole(branch.x)
        if self._joining is None:
            h = self.join(h, branch, eps)
            return h, self.norm(h, w, eps)
        post, weights = branch.norm and branch.norm.data, branch.experts and branch.experts.weights
        x, bias, index = parts(branch.x)
        total, y = self._joining.add_norm(h.data, x, w.data, eps, post, branch.factor, weights, bias, index)
        return Value(total), Value(y)

    def head_norm(self, x: Value, w: Value, n_embd_head: int, eps: float) -> Value:
        """RMS norm of each head."""
        layout = self._elementwise(x)
        heads = x.data.reshape(x.data.shape[0], -1, n_embd_head)
        return Value(self.backend.rms_norm(heads, w.data, eps).reshape(x.data.shape), layout)

    def rope(self, x: Value, table: Handle, n_embd_head: int) -> Value:
        """Rotate each head by its token's position."""
        layout = self._elementwise(x)
        heads = x.data.reshape(x.data.shape[0], -1, n_embd_head)
        return Value(self.backend.rope(heads, table).reshape(x.data.shape), layout)

    def rope_table(self, positions: np.ndarray, rope: Rope, factors: Value | None) -> Handle:
        """Prepare the rotations of a step."""
        return self.backend.rope_table(positions, rope, factors.data if factors else None)

    def gated(self, activation: str, gate: Value, up: Value) -> Value:
        """Return act(gate) * up."""
        layout = self._pair(gate, up)
        (g, gate_bias, index), (u, up_bias, other) = parts(gate), parts(up)
        if self._joining and index is not None and index is other:
            return Value(self._joining.gated(activation, g, u, (gate_bias, up_bias, index)), layout)
        return Value(self.backend.gated(activation, gate.data, up.data), layout)

    def sigmoid(self, x: Value) -> Value:
        """Return the logistic function."""
        layout = self._elementwise(x)
        return Value(self.backend.sigmoid(x.data), layout)

    def softcap(self, x: Value, cap: float) -> Value:
        """Return cap * tanh(x / cap); x itself where the cap is 0."""
        if not cap:
            return x
        layout = self._elementwise(x)
        return Value(self.backend.softcap(x.data, cap), layout)

    # -- attention -------------------------------------------------------------------------------------------------

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        cache: Handle,
        batch: Batch,
        *,
        n_embd_head: tuple[int, int],
        scale: float,
        softcap: float,
        window: int,
        sinks: Value | None,
        rope: Handle | None = None,
        norms: tuple[Value, Value, float] | None = None,
    ) -> Value:
        """Norm the heads of q and k, rotate them, store k and v, then attend causally.

        ``n_embd_head``: elements of a key and of a value; ``norms``: weights for q and k, and eps.
        """
        n_k, n_v = n_embd_head
        layout = self._elementwise(q)
        for other in (k, v):
            self._elementwise(other)
        before: tuple[Any, ...] = ()
        arrays, biases, _ = zip(*map(parts, (q, k, v)), strict=True)
        if self._joining:
            head_norms = HeadNorms(norms[0].data, norms[1].data, norms[2]) if norms else None
            before = rope, head_norms, biases
        elif norms:
            q, k = self.head_norm(q, norms[0], n_k, norms[2]), self.head_norm(k, norms[1], n_k, norms[2])
        if rope is not None and not before:
            if self._fusing:
                before = (rope,)
            else:
                q, k = self.rope(q, rope, n_k), self.rope(k, rope, n_k)
        if not self._joining:
            arrays = q.data, k.data, v.data
        n_tokens, *_ = arrays[0].shape
        n_head, n_kv = (x.shape[1] // n_k for x in arrays[:2])
        params = AttentionParams(scale, softcap, window, self._kv_heads(q.layout, k.layout, n_head, n_kv, n_k))
        attend: Callable[..., Array] = self.backend.attention
        out = attend(
            *(x.reshape(n_tokens, -1, n) for x, n in zip(arrays, (n_k, n_k, n_v), strict=True)),
            cache,
            batch,
            params,
            sinks.data if sinks else None,
            *before,
        )
        if isinstance(layout, Shard):
            layout = _of_values(layout, n_k, n_v)
        return Value(out.reshape(n_tokens, -1), layout)

    def _kv_heads(self, q: Layout, k: Layout, n_head: int, n_kv: int, n_k: int) -> tuple[int, ...]:
        """Return, for each of the rank's query heads, which of its KV heads it reads."""
        if not isinstance(q, Shard) or not isinstance(k, Shard):
            return _readers(n_head, n_head // n_kv, 0, 0)
        group = q.cut.size // k.cut.size
        first = q.cut.ranges[self._group.rank][0] // n_k
        first_kv = k.cut.ranges[self._group.rank][0] // n_k
        return _readers(n_head, group, first, first_kv)

    # -- mixture of experts ----------------------------------------------------------------------------------------

    def route(self, logits: Value, n_used: int, gating: str, normalize: bool) -> Experts:
        """Choose experts by the router's logits."""
        if self._joining and isinstance(logits.layout, Replicate):
            x, bias, _ = parts(logits)
            index, weights = self._joining.route(x, n_used, gating, normalize, bias)
        else:
            index, weights = self.backend.route(self.whole(logits), n_used, gating, normalize)
        if not self._alike:
            index = self.backend.as_index(self._leaders(self.backend.as_numbers(index)))
            weights = self._leaders(weights)
        return Experts(index, weights)

    def _held(self, cut: Cut, experts: Experts) -> Array:
        """Return which of this rank's experts the chosen ones are, (T, K), -1 for those of other ranks."""
        found = experts.held.get(cut)
        if found is None:
            found = experts.held[cut] = self.backend.held(experts.index, *cut.ranges[self._group.rank])
        return found

    def expert_linear(self, x: Value, w: Weight, experts: Experts) -> Value:
        """Multiply each token, or each token's K activations, by its experts' matrices."""
        if w.axis == "expert":
            cut = some(w.cut)
            if x.layout != Routed(cut):
                self.whole(x)
            return Value(self.backend.expert_linear(x.data, w.handle, self._held(cut, experts)), Routed(cut))
        layout = self._linear_layout(x, w)
        return Value(self.backend.expert_linear(x.data, w.handle, experts.index), layout)

    def expert_scale(self, x: Value, scales: Value, experts: Experts) -> Value:
        """Multiply by one number for each expert."""
        chosen = self.backend.take(self.whole(scales), experts.index)
        return Value(self.backend.mul(x.data, chosen.reshape(*chosen.shape, 1)), x.layout)

    def expert_bias(self, x: Value, bias: Value, experts: Experts) -> Value:
        """Add each expert's bias."""
        if isinstance(x.layout, Routed):
            if x.layout.cut.width(self._group.rank) == 0:
                return x
            held = self._held(x.layout.cut, experts)
            return Value(self.backend.add_taken(x.data, bias.data, held), self._pair(x, bias))
        if self._joining and self._joins(x, bias):
            total = partial(self._joining.add_taken, x.data, bias.data, experts.index)
            return Biased(x, bias.data, experts.index, total)
        return self.add(x, Value(self.backend.take(bias.data, experts.index), bias.layout))

    def expert_sum(self, x: Value, experts: Experts) -> Value:
        """Sum the experts' answers by their weights; answers that are elsewhere leave a partial sum."""
        layout = PARTIAL if isinstance(x.layout, Routed) else x.layout
        return Value(self.backend.sum_experts(x.data, experts.weights), layout)


@cache
def _readers(n_head: int, n_per_kv: int, first: int, first_kv: int) -> tuple[int, ...]:
    """Return which KV head each query head from ``first`` on reads, counted from ``first_kv``."""
    return tuple((first + head) // n_per_kv - first_kv for head in range(n_head))


@cache
def _side_by_side(n: int, n_ranks: int) -> Cut:
    """Return the cut of which each rank has n elements."""
    return Cut(n * n_ranks, tuple((n * rank, n * rank + n) for rank in range(n_ranks)))


@cache
def _of_values(keys: Shard, n_k: int, n_v: int) -> Shard:
    """Return the cut of whole heads' values, as heads' keys are cut."""
    heads = Cut(keys.cut.size // n_k, tuple((a // n_k, b // n_k) for a, b in keys.cut.ranges))
    return Shard(heads.scaled(n_v))
