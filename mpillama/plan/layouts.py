"""Layouts of a model on a cluster: which there are, whether they fit, and what they would reach.

A layout is TP x PP x DP: ranks that share every block, stages of contiguous blocks, and replicas. Consecutive ranks
make a tensor-parallel group, consecutive groups the stages of a replica.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from mpillama.backends.base import KV_BLOCK
from mpillama.backends.kv_codec import row_bytes
from mpillama.layout import apportion
from mpillama.plan.cluster import GIB, Cluster
from mpillama.plan.cost import Cost, Span, events_cost, group_span, send_seconds
from mpillama.plan.walk import EMBEDDING, HEAD, PlanModel, Walk, rank_classes, step_batch, walk
from mpillama.sharding import Sharding


@dataclass(frozen=True)
class Workload:
    """What the cluster is to do: ``n_seqs`` sequences at once, each with a prompt and tokens generated after it.

    Attributes:
        n_ctx: tokens that each sequence may have.
        pipelined: whether the stages of a pipeline work at the same time on different tokens; else they take turns.
    """

    n_prompt: int = 512
    n_gen: int = 128
    n_seqs: int = 1
    n_ctx: int = 4096
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    pipelined: bool = False


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank, and what would fit in tokens.

    Attributes:
        kv: for the workload's sequences and context.
        total: with what drivers, libraries and the program take.
        max_ctx: the longest context of a single sequence in each replica.
        max_seqs: the most sequences of the workload's context, in all replicas.
    """

    weights: int
    kv: int
    buffers: int
    total: int
    available: int
    max_ctx: int
    max_seqs: int

    @property
    def fits(self) -> bool:
        """Whether there is room for all of it."""
        return self.total <= self.available


@dataclass(frozen=True)
class Layout:
    """A layout and what it comes to; speeds are tokens per second of the whole cluster."""

    tp: int
    pp: int
    dp: int
    span: Span
    memory: Memory
    prefill: float
    decode: float
    seconds: float
    decode_cost: Cost = field(default_factory=Cost)
    prefill_cost: Cost = field(default_factory=Cost)
    weights_per_rank: tuple[int, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether there is room for it."""
        return self.memory.fits

    @property
    def name(self) -> str:
        """As the flags have it."""
        return f"--tp {self.tp} --pp {self.pp} --dp {self.dp}"


def grids(n_ranks: int, n_layer: int) -> Iterator[tuple[int, int, int]]:
    """Yield every (tp, pp, dp) whose product is ``n_ranks``, with a block for each stage."""
    for tp in range(1, n_ranks + 1):
        if n_ranks % tp:
            continue
        for pp in range(1, n_ranks // tp + 1):
            if n_ranks // tp % pp == 0 and pp <= n_layer:
                yield tp, pp, n_ranks // tp // pp


def stages(n_layer: int, pp: int) -> list[range]:
    """Return the blocks of each stage: contiguous, as many each as can be."""
    result, start = [], 0
    for count in apportion(n_layer, (1.0,) * pp):
        result.append(range(start, start + count))
        start += count
    return result


class Planner:
    """Works layouts out; walks and sums of bytes are kept and used again."""

    def __init__(self, model: PlanModel, cluster: Cluster, work: Workload) -> None:
        self.model, self.cluster, self.work = model, cluster, work
        self._sharding = lru_cache(None)(self._make_sharding)
        self._walks = lru_cache(None)(self._make_walks)
        self._bytes = lru_cache(None)(self._make_bytes)

    def layouts(self) -> list[Layout]:
        """Return all layouts: those that fit first, the fastest first."""
        found = [self.layout(*grid) for grid in grids(self.cluster.n_ranks, self.model.cfg.n_layer)]
        return sorted(found, key=lambda layout: (not layout.fits, layout.seconds, layout.pp, layout.tp))

    # -- sums over ranks -----------------------------------------------------------------------------------------------

    def _make_sharding(self, tp: int) -> tuple[Sharding, list[tuple[int, int]]]:
        sharding = Sharding(self.model.cfg, (1.0,) * tp)
        return sharding, rank_classes(sharding)

    def _make_bytes(self, tp: int) -> tuple[list[list[int]], dict[tuple[bool, bool], list[int]]]:
        """Return, for each class of ranks: bytes of a block of each kind; of what the first and last stage hold."""
        sharding, classes = self._sharding(tp)
        blocks = [
            [sharding.bytes_of(self.model.by_block[il], rank) for il in self.model.examples] for rank, _ in classes
        ]
        outside = {
            (first, last): [sharding.bytes_of(self.model.outside(first, last), rank) for rank, _ in classes]
            for first in (False, True)
            for last in (False, True)
        }
        return blocks, outside

    def stage_bytes(self, tp: int, pp: int) -> list[list[int]]:
        """Return the bytes of weights by stage and class of ranks."""
        blocks, outside = self._bytes(tp)
        result = []
        for blocks_here in stages(self.model.cfg.n_layer, pp):
            extra = outside[blocks_here.start == 0, blocks_here.stop == self.model.cfg.n_layer]
            kinds = [self.model.kinds[il] for il in blocks_here]
            result.append([sum(mine[kind] for kind in kinds) + more for mine, more in zip(blocks, extra, strict=True)])
        return result

    def _make_walks(self, tp: int, n_seqs: int, n_tokens: int, n_past: int) -> list[Walk]:
        """Walk as the first rank, which also adds what is not cut, and as the one with most weights."""
        sharding, classes = self._sharding(tp)
        blocks, _ = self._bytes(tp)
        heaviest = max(range(len(classes)), key=lambda i: sum(blocks[i]))
        batch = step_batch(n_seqs, n_tokens, n_past)
        ranks = sorted({0, classes[heaviest][0]})
        return [walk(self.model, sharding, rank, batch, self.work.type_k, self.work.type_v) for rank in ranks]

    # -- one layout ----------------------------------------------------------------------------------------------------

    def prefill_step(self, n_seqs: int) -> tuple[int, int, int]:
        """Return sequences, tokens of each and tokens before them of an average step through prompts."""
        work = self.work
        n_tokens = min(work.n_prompt, work.n_ubatch)
        return max(1, min(n_seqs, work.n_ubatch // n_tokens)), n_tokens, (work.n_prompt - n_tokens) // 2

    def decode_step(self, n_seqs: int) -> tuple[int, int, int]:
        """Return the same of an average step of generation."""
        return n_seqs, 1, self.work.n_prompt + self.work.n_gen // 2

    def walks(self, tp: int, step: tuple[int, int, int]) -> list[Walk]:
        """Return the walks of a step."""
        return self._walks(tp, *step)

    def layout(self, tp: int, pp: int, dp: int) -> Layout:
        """Work one layout out."""
        work = self.work
        n_seqs = -(-work.n_seqs // dp)
        busy = -(-work.n_seqs // n_seqs)
        span = group_span(self.cluster, tp)
        memory, weights = self._memory(tp, pp, dp, n_seqs)

        step = self.prefill_step(n_seqs)
        n_steps = n_seqs * work.n_prompt / (step[0] * step[1])
        prefill = self._run(tp, pp, span, step, max(1.0, n_steps))
        n_micro = min(pp, n_seqs) if work.pipelined else 1
        decode = self._run(tp, pp, span, self.decode_step(-(-n_seqs // n_micro)), n_micro, forever=True)
        seconds = prefill.total + work.n_gen * decode.total
        return Layout(
            tp,
            pp,
            dp,
            span,
            memory,
            min(work.n_seqs, busy * n_seqs) * work.n_prompt / prefill.total,
            work.n_seqs / decode.total,
            seconds,
            decode,
            prefill,
            weights,
        )

    def _run(
        self, tp: int, pp: int, span: Span, step: tuple[int, int, int], n_steps: float, forever: bool = False
    ) -> Cost:
        """Return what ``n_steps`` steps take; ``forever``: as one round of a pipeline that never runs dry."""
        device = self.cluster.device
        parts: dict[str, Cost] = {}
        for way in self.walks(tp, step):
            for name, events in way.parts.items():
                cost = events_cost(events, span, self.cluster)
                if name not in parts or cost.total > parts[name].total:
                    parts[name] = cost
        n_layer = self.model.cfg.n_layer
        costs = []
        for index, blocks in enumerate(stages(n_layer, pp)):
            cost = Cost()
            if blocks.start == 0:
                cost = cost.plus(parts[EMBEDDING])
            for il in blocks:
                cost = cost.plus(parts[str(self.model.kinds[il])])
            if blocks.stop == n_layer:
                cost = cost.plus(parts[HEAD])
            else:
                cost.add("sends", self._send(tp, index, step[0] * step[1]))
            costs.append(cost)
        once = Cost()
        for cost in costs:
            once = once.plus(cost)
        once.add("overhead", device.step_us * 1e-6)
        if not self.work.pipelined or pp == 1:
            return Cost().plus(once, n_steps)
        slowest = max(costs, key=lambda cost: cost.total)
        if forever:
            round_trip = Cost().plus(slowest, n_steps)
            return max(once, round_trip, key=lambda cost: cost.total)
        return once.plus(slowest, n_steps - 1)

    def _send(self, tp: int, stage: int, n_tokens: int) -> float:
        """Return the time of the message from a stage to the next."""
        cluster = self.cluster
        last, following = (stage + 1) * tp - 1, (stage + 1) * tp
        link = cluster.within if cluster.host(last) == cluster.host(following) else cluster.between
        return send_seconds(4.0 * n_tokens * self.model.cfg.n_embd, link, cluster.device)

    def _memory(self, tp: int, pp: int, dp: int, n_seqs: int) -> tuple[Memory, tuple[int, ...]]:
        cfg, work, device = self.model.cfg, self.work, self.cluster.device
        sharding, classes = self._sharding(tp)
        tokens = n_seqs * -(-work.n_ctx // KV_BLOCK) * KV_BLOCK
        widest = max((self.prefill_step(n_seqs), self.decode_step(n_seqs)), key=lambda step: step[0] * step[1])
        buffers = max(way.buffers for way in self.walks(tp, widest))
        available, reserve = int(device.memory_gb * GIB), int(device.reserve_gb * GIB)
        fullest, room = (0, 0, 0), 1 << 62
        by_stage = self.stage_bytes(tp, pp)
        for blocks, weights in zip(stages(cfg.n_layer, pp), by_stage, strict=True):
            for (rank, _), mine in zip(classes, weights, strict=True):
                cuts = sharding.cuts
                of_block = row_bytes(work.type_k, cuts["k"].width(rank)) + row_bytes(work.type_v, cuts["v"].width(rank))
                per_token = len(blocks) * of_block
                kv = per_token * tokens
                fullest = max(fullest, (mine + kv, mine, kv))
                free = available - reserve - buffers - mine
                if per_token or free < 0:
                    room = min(room, int(free / max(per_token, 1)) // KV_BLOCK * KV_BLOCK)
        room = max(room, 0)
        total = fullest[0] + buffers + reserve
        max_seqs = room // (-(-work.n_ctx // KV_BLOCK) * KV_BLOCK) * dp
        memory = Memory(fullest[1], fullest[2], buffers, total, available, room, max_seqs)
        counts = [count for _, count in classes]
        each = tuple(n for weights in by_stage for n, count in zip(weights, counts, strict=True) for _ in range(count))
        return memory, each
