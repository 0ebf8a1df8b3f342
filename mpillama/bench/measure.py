"""Running a workload and accounting for its time: by step and rank, in collectives and outside of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.backends.kv_codec import row_bytes
from mpillama.bench.model import StepBytes
from mpillama.bench.plan import Test
from mpillama.comm.base import Arrival
from mpillama.comm.metered import MeteredGroup
from mpillama.runner import Runner

Run = Callable[[Batch], Any]


@dataclass
class RankSteps:
    """What one rank did in a number of steps; times in nanoseconds, an item for each step."""

    total_ns: list[int] = field(default_factory=list)
    comm_ns: list[int] = field(default_factory=list)
    n_tokens: list[int] = field(default_factory=list)
    n_logits: list[int] = field(default_factory=list)
    comm_calls: int = 0
    comm_bytes: int = 0
    kv_bytes: int = 0
    kernel_ns: list[int] = field(default_factory=list)
    """Empty where the backend does not count it."""


class MeteredRunner(Runner):
    """A runner that keeps account of its steps; its ops must use the metered group that it is given."""

    def __init__(self, *args: Any, group: MeteredGroup) -> None:
        super().__init__(*args)
        self._group = group
        self._steps = RankSteps()
        cfg, _, _, n_head_kv, _, type_k, type_v = args[:7]
        self._kv_bytes = n_head_kv * (row_bytes(type_k, cfg.n_embd_head_k) + row_bytes(type_v, cfg.n_embd_head_v))
        # A backend that counts the time in its kernels has the method ``kernel_ns``.
        self._kernel_ns: Callable[[], int] | None = getattr(self._ops.backend, "kernel_ns", None)

    def begin(self, batch: Batch) -> Arrival:
        """Do this rank's part of a batch; waiting for the logits of a later stage is no part of it."""
        self._group.take()
        kernels = self._kernel_ns() if self._kernel_ns else 0
        began = time.perf_counter_ns()
        logits = super().begin(batch)
        passed = time.perf_counter_ns() - began
        traffic, steps = self._group.take(), self._steps
        if self._kernel_ns:
            steps.kernel_ns.append(self._kernel_ns() - kernels)
        steps.total_ns.append(passed)
        steps.comm_ns.append(traffic.ns)
        steps.n_tokens.append(len(batch.tokens))
        steps.n_logits.append(len(batch.logit_rows))
        steps.comm_calls += traffic.calls
        steps.comm_bytes += traffic.nbytes
        steps.kv_bytes += self._kv_bytes * sum(self._kv_tokens(batch, il) for il in self._stage)
        return logits

    def _kv_tokens(self, batch: Batch, il: int) -> int:
        """Return of how many tokens block ``il`` reads keys and values, each once for a sequence."""
        ends = batch.positions[np.cumsum(batch.seq_lens) - 1] + 1
        window = self.cfg.windows[il]
        return int((np.minimum(ends, window + batch.seq_lens - 1) if window else ends).sum())

    def take(self) -> RankSteps:
        """Return the steps since the last call."""
        steps, self._steps = self._steps, RankSteps()
        return steps


class Workload:
    """Feeds random tokens to a model, as a benchmark does: without a tokenizer and without sampling.

    Args:
        run: takes a batch and runs it on all ranks.
        n_kv_blocks: of the KV cache.
        n_vocab: of the model.
        stopped: whether to give up, asked before each step.
        seed: of the tokens.
    """

    def __init__(self, run: Run, n_kv_blocks: int, n_vocab: int, stopped: Callable[[], bool], seed: int = 0) -> None:
        self._run, self._n_kv_blocks, self._n_vocab, self._stopped = run, n_kv_blocks, n_vocab, stopped
        self._rng = np.random.default_rng(seed)

    def _step(self, sequences: np.ndarray, positions: np.ndarray, logit_rows: np.ndarray, n_parallel: int) -> None:
        """Run a step on random tokens of these sequences (ascending) at these positions, all int32 (T,)."""
        n_each = self._n_kv_blocks // n_parallel
        found, seq_lens = np.unique(sequences, return_counts=True)
        n_used = int(positions.max()) // KV_BLOCK + 1
        self._run(
            Batch(
                tokens=self._rng.integers(0, self._n_vocab, len(positions), np.int32),
                positions=positions.astype(np.int32),
                seq_lens=seq_lens.astype(np.int32),
                block_tables=(found[:, None] * n_each + np.arange(n_used)).astype(np.int32),
                logit_rows=logit_rows.astype(np.int32),
            )
        )

    def prompt(self, n_past: int, n_tokens: int, n_batch: int, n_ubatch: int, n_parallel: int = 1) -> None:
        """Evaluate tokens of each sequence after ``n_past`` others: ``n_batch`` at a time in ubatches.

        Logits are wanted of the last token of a batch, and of the last one of each sequence.
        """
        total = n_parallel * n_tokens
        for start in range(0, total, n_batch):
            stop = min(start + n_batch, total)
            for first in range(start, stop, n_ubatch):
                if self._stopped():
                    return
                rows = np.arange(first, min(first + n_ubatch, stop))
                last = np.flatnonzero((rows % n_tokens == n_tokens - 1) | (rows == stop - 1))
                self._step(rows // n_tokens, n_past + rows % n_tokens, last, n_parallel)

    def generate(self, n_past: int, n_tokens: int, n_parallel: int = 1) -> None:
        """Evaluate tokens one by one after ``n_past`` others in each sequence, each with logits."""
        sequences = np.arange(n_parallel)
        for position in range(n_past, n_past + n_tokens):
            if self._stopped():
                return
            self._step(sequences, np.full(n_parallel, position), sequences, n_parallel)

    def test(self, test: Test, n_batch: int, n_ubatch: int) -> None:
        """Run what is timed of a test."""
        self.prompt(test.n_depth, test.n_prompt, n_batch, n_ubatch, test.n_parallel)
        self.generate(test.n_depth + test.n_prompt, test.n_gen, test.n_parallel)


@dataclass(frozen=True)
class Figures:
    """What a test came to. Spreads are those of a sample (n - 1), 0 for a single one.

    Attributes:
        samples_ns: of each repetition.
        comm_us: microseconds that a rank spends in collectives per token, waiting for others included; mean of ranks.
        comm_min_us: the same, of the rank that spends least in each step: the transfers with hardly any waiting.
        comm_bytes: bytes of the collectives' results per token, on one rank.
        comm_calls: collectives per token.
        host_us: microseconds that a rank spends in neither kernels nor collectives per token, mostly in Python;
            mean of ranks. None where the backend does not count the time in its kernels.
        skew_us: per step, the longest less the shortest time that a rank spends outside of collectives.
        overhead_us: per token, what passes between two steps on rank 0: planning, and sending the plan.
        weight_bytes: bytes of weights per token, of all ranks.
        kv_bytes: bytes of cached keys and values per token, of all ranks.
        read_gbps: 1e9 bytes of both per second.
    """

    samples_ns: tuple[int, ...]
    samples_ts: tuple[float, ...]
    comm_us: float
    comm_min_us: float
    comm_bytes: float
    comm_calls: float
    host_us: float | None
    skew_us: float
    overhead_us: float
    weight_bytes: float
    kv_bytes: float
    read_gbps: float

    @property
    def avg_ns(self) -> int:
        """Mean time of a repetition."""
        return round(fmean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        """Spread of the time of a repetition."""
        return round(spread(self.samples_ns))

    @property
    def avg_ts(self) -> float:
        """Mean of the repetitions' tokens per second."""
        return fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        """Spread of the repetitions' tokens per second."""
        return spread(self.samples_ts)


def spread(samples: Sequence[float]) -> float:
    """Return the standard deviation of a sample."""
    return stdev(samples) if len(samples) > 1 else 0.0


def figures(
    n_tokens: int, samples_ns: Sequence[int], repetitions: Sequence[Sequence[RankSteps]], reads: StepBytes
) -> Figures:
    """Put repetitions together.

    Args:
        n_tokens: timed in each repetition.
        samples_ns: time of each repetition, as rank 0 saw it.
        repetitions: for each of them, the steps of each rank.
        reads: what steps read.
    """
    n_all = n_tokens * len(samples_ns)
    by_rank = list(zip(*repetitions, strict=True))
    total = np.array([[ns for steps in rank for ns in steps.total_ns] for rank in by_rank], np.float64)
    comm = np.array([[ns for steps in rank for ns in steps.comm_ns] for rank in by_rank], np.float64)
    compute = total - comm
    kernels = np.array([[ns for steps in rank for ns in steps.kernel_ns] for rank in by_rank], np.float64)
    first = by_rank[0]
    n_bytes = sum(
        reads.of(tokens, logits)
        for steps in first
        for tokens, logits in zip(steps.n_tokens, steps.n_logits, strict=True)
    )
    n_kv_bytes = sum(steps.kv_bytes for rank in by_rank for steps in rank)
    return Figures(
        samples_ns=tuple(samples_ns),
        samples_ts=tuple(1e9 * n_tokens / ns for ns in samples_ns),
        comm_us=float(comm.sum(axis=1).mean()) / n_all / 1e3,
        comm_min_us=float(comm.min(axis=0).sum()) / n_all / 1e3,
        comm_bytes=sum(steps.comm_bytes for steps in first) / n_all,
        comm_calls=sum(steps.comm_calls for steps in first) / n_all,
        host_us=float((compute - kernels).sum(axis=1).mean()) / n_all / 1e3 if kernels.size else None,
        skew_us=float((compute.max(axis=0) - compute.min(axis=0)).mean()) / 1e3,
        overhead_us=(sum(samples_ns) - float(total[0].sum())) / n_all / 1e3,
        weight_bytes=n_bytes / n_all,
        kv_bytes=n_kv_bytes / n_all,
        read_gbps=(n_bytes + n_kv_bytes) / sum(samples_ns),
    )
