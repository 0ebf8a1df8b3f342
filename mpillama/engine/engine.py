"""Continuous batching: requests in, tokens and text out, one step at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from mpillama.backends.base import KV_BLOCK, Batch
from mpillama.engine.base import Counters, EngineLike, Stats
from mpillama.engine.blocks import BlockManager, names_of
from mpillama.engine.branch import Branch
from mpillama.engine.embedding import Pooling
from mpillama.engine.executor import Executor, Flight, OneByOne
from mpillama.engine.logprobs import read_prompt
from mpillama.engine.request import Logprob, Output, Request, Timings, Usage
from mpillama.engine.sampling.candidates import Candidates
from mpillama.engine.scheduler import Plan, Scheduler
from mpillama.engine.writer import Writer
from mpillama.errors import UsageError, UserError
from mpillama.tokenizer.base import Tokenizer

_LOGITS_BYTES = 64 << 20
"""Logits of a prompt's tokens that one step may bring, when their logprobs are wanted."""


@dataclass
class _Active:
    """A request that has not ended: its open continuations, and for ``best_of`` what they have written so far."""

    request: Request
    arrival: float
    writers: dict[int, Writer]
    branches: dict[int, Branch] = field(default_factory=dict)
    pooling: Pooling | None = None
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)
    began: float | None = None
    prompt_done: float | None = None
    kept: dict[int, tuple[float, Output]] = field(default_factory=dict)


class Engine(EngineLike):
    """Runs many requests at once over one KV cache; not thread-safe, and all of it on one rank.

    Args:
        executor: of all ranks; a function that runs a batch and returns its result stands for one batch at a time.
        tokenizer: None: ids in, ids out, no text.
        n_vocab: of the logits.
        n_ctx: tokens of one sequence at most; never more than the KV cache holds.
        n_blocks: of the KV cache.
        n_batch: tokens of a step at most.
        n_parallel: sequences at a time.
        block_size: tokens in a KV block.
        pooling: of embeddings, see `embedding.pooling_type`.
        priority_seconds: how much earlier a request counts as arrived for each level of its priority.
        clock: seconds, never going back.

    Raises:
        UsageError: sizes that do not fit together.
    """

    def __init__(
        self,
        executor: Executor | Callable[[Batch], np.ndarray],
        tokenizer: Tokenizer | None,
        n_vocab: int,
        n_ctx: int,
        n_blocks: int,
        n_batch: int = 512,
        n_parallel: int = 1,
        *,
        block_size: int = KV_BLOCK,
        pooling: str = "mean",
        priority_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if n_parallel < 1 or n_batch < n_parallel:
            raise UsageError(
                f"a step of {n_batch} tokens cannot serve {n_parallel} sequences; lower -np, or raise -b and -ub"
            )
        self._executor = OneByOne(executor) if callable(executor) else executor
        self._tokenizer, self._n_vocab = tokenizer, n_vocab
        self.n_ctx = min(n_ctx, n_blocks * block_size)
        self.n_parallel = self.n_places = n_parallel
        self._pooling, self._clock = pooling, clock
        self.priority_seconds = priority_seconds
        self._blocks = BlockManager(n_blocks, block_size)
        self._scheduler = Scheduler(self._blocks, n_batch, n_parallel, max(1, _LOGITS_BYTES // (4 * n_vocab)))
        self._active: dict[str, _Active] = {}
        self._counters = Counters()
        self._flights: deque[Flight] = deque()
        self._early: list[Output] = []

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request in.

        Raises:
            UserError: it can never be run, or its parameters do not fit the model.
        """
        self.check(request)
        arrival = self._clock() if request.arrival is None else request.arrival
        key = (arrival - request.params.priority * self.priority_seconds, self._counters.requests, 0)
        branch = Branch(request, 0, key, self.n_ctx, self._blocks.block_size)
        writers = {} if branch.embedding else {0: self._writer(request, 0)}
        active = _Active(request, arrival, writers, {0: branch})
        self._counters.requests += 1
        self._active[request.id] = active
        self._scheduler.add(branch)

    def _writer(self, request: Request, index: int) -> Writer:
        return Writer(request, index, self._tokenizer, self._n_vocab, self.n_ctx)

    def check(self, request: Request) -> None:
        """Raise UserError for a request that can never be run."""
        params, prompt = request.params, request.prompt
        if request.id in self._active:
            raise UserError(f"there is a request {request.id} already; give each an id of its own")
        if not prompt:
            raise UserError("the prompt is empty; give at least one token")
        if len(prompt) + (not params.embedding) > self.n_ctx:
            raise UserError(
                f"the prompt has {len(prompt)} tokens but the context holds {self.n_ctx}; shorten it, or raise -c"
            )
        if min(prompt) < 0 or max(prompt) >= self._n_vocab:
            wrong = min(prompt) if min(prompt) < 0 else max(prompt)
            raise UserError(f"token {wrong} is not in the vocabulary; ids go from 0 to {self._n_vocab - 1}")
        if params.n_branches > self.n_parallel:
            raise UserError(
                f"{params.n_branches} continuations were asked for, but at most {self.n_parallel} sequences run "
                "at a time; lower n and best_of, or raise -np"
            )
        if self._tokenizer is None and (params.stop or params.reasoning_budget >= 0):
            raise UserError("stop strings and a reasoning budget need a tokenizer, which the model does not have")

    def cancel(self, request_id: str) -> list[Output]:
        """Drop a request and free its KV blocks at once; returns the last output of each open continuation."""
        active = self._active.pop(request_id, None)
        if active is None:
            return []
        params = active.request.params
        self._counters.cancelled += 1
        ranked = params.n_branches > params.n
        begun = not ranked and all(branch.weight == 1 for branch in active.branches.values())
        outputs = []
        for index in sorted(active.branches) if begun else range(params.n):
            writer = active.writers.get(index)
            output = writer.cancel() if writer and begun else Output(request_id, index, finish_reason="cancelled")
            self._complete(active, output)
            outputs.append(output)
        outputs[-1].last = True
        for branch in active.branches.values():
            self._scheduler.remove(branch)
        return outputs

    def has_work(self) -> bool:
        """Whether there is anything to do in a step."""
        return bool(self._active or self._flights or self._early)

    def stats(self) -> Stats:
        """Return the counters and the state of queues and KV cache."""
        counters = {f.name: getattr(self._counters, f.name) for f in fields(Counters)}
        counters["preemptions"] = self._scheduler.n_preemptions
        return Stats(
            **counters,
            waiting=sum(branch.weight for branch in self._scheduler.waiting),
            running=sum(branch.weight for branch in self._scheduler.running),
            kv_blocks=self._blocks.n_blocks,
            kv_used=self._blocks.n_used,
            kv_cached=self._blocks.n_cached,
        )

    # -- the prefix cache from outside -----------------------------------------------------------------------------

    def cached_blocks(self, tokens: Sequence[int]) -> list[int]:
        """Return the full KV blocks that hold the beginning of these tokens; the next step may give them up.

        No step is under way then.
        """
        self.settle()
        return self._blocks.find(names_of(tokens, self._blocks.block_size))

    def adopt(self, tokens: Sequence[int], fill: Callable[[int, list[int]], None]) -> int:
        """Take KV that was computed elsewhere into the prefix cache, as much as there is room for.

        Args:
            tokens: of the sequence.
            fill: called with the number of a first block of the sequence and the KV blocks for it and its successors,
                has to fill these; if it raises, they are forgotten.

        Returns:
            How many of the tokens are in the cache now.
        """
        self.settle()
        blocks, names = self._blocks, names_of(tokens, self._blocks.block_size)
        known = blocks.find(names)
        blocks.take(known)
        new = [blocks.allocate() for _ in range(min(len(names) - len(known), blocks.n_available))]
        try:
            if new:
                fill(len(known), new)
            for block, name in zip(new, names[len(known) :], strict=False):
                blocks.register(block, name)
        finally:
            blocks.release([*known, *new])
        return (len(known) + len(new)) * blocks.block_size

    def forget(self, tokens: Sequence[int]) -> int:
        """Drop from the prefix cache what nobody uses of these tokens; returns how many of them."""
        return self._blocks.discard(self.cached_blocks(tokens)) * self._blocks.block_size

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Run one step on all ranks and return what it has added to each continuation that took part.

        As many steps as the executor takes are under way at a time; the one returned began first.

        Raises:
            UserError: a rank has failed; the engine cannot go on.
        """
        if self._early:
            outputs, self._early = self._early, []
            return outputs
        began = self._clock()
        while (free := self._executor.max_in_flight - len(self._flights)) and self._submit(began, free):
            pass
        outputs = self._collect() if self._flights else []
        self._counters.step_seconds += self._clock() - began
        return outputs

    def settle(self) -> None:
        """Wait for the steps that are under way, so that the ranks can do something else; `step` gives the outputs."""
        while self._flights:
            self._early += self._collect()

    def _submit(self, now: float, share: int) -> bool:
        """Begin the next step, with no more than its share of the branches that decode; False if there is none."""
        plan = self._scheduler.plan(share)
        if plan is None:
            return False
        counters = self._counters
        starts = tuple(branch.n_past for branch, _ in plan.parts)
        ends = tuple(branch.pending == n for branch, n in plan.parts)
        for (branch, n), start in zip(plan.parts, starts, strict=True):
            active = self._active[branch.request.id]
            if active.began is None:
                active.began = now
                counters.cached_tokens += branch.n_cached
            if n > 1 or start < len(branch.request.prompt):
                counters.prompt_tokens += n
            branch.advance(self._blocks, n)
            branch.in_flight += 1
        began = self._clock()
        n_top = self._n_top(plan)
        self._executor.submit(replace(plan.batch, n_top=n_top))
        counters.run_seconds += self._clock() - began
        counters.steps += 1
        counters.copied_blocks += len(plan.batch.copies)
        self._flights.append(Flight(plan, starts, ends, n_top))
        return True

    def _n_top(self, plan: Plan) -> int:
        """Return how many of the largest logits of each row are enough for this step; 0 if all are needed."""
        most = 1
        for (branch, _), n_rows in zip(plan.parts, plan.n_rows, strict=True):
            if not n_rows:
                continue
            wanted = 0
            if not branch.all_rows and not plan.embedding:
                wanted = self._active[branch.request.id].writers[branch.index].n_top()
            if not wanted:
                return 0
            most = max(most, wanted)
        return next((n for n in self._executor.n_tops if n >= most), 0)

    def _collect(self) -> list[Output]:
        """Wait for the step that began first, and return what it has added."""
        flight = self._flights.popleft()
        began = self._clock()
        result = self._executor.collect()
        now = self._clock()
        self._counters.run_seconds += now - began
        outputs: list[Output] = []
        stop = 0
        parts = zip(flight.plan.parts, flight.plan.n_rows, flight.starts, flight.ends, strict=True)
        for (branch, _), n_rows, start, ends in parts:
            stop += n_rows
            branch.in_flight -= 1
            active = self._active.get(branch.request.id)
            # A request may have been cancelled meanwhile, and its id given to another.
            if active is None or active.branches.get(branch.index) is not branch:
                continue
            rows = result[stop - n_rows : stop]
            if flight.plan.embedding:
                outputs += self._embed(active, branch, rows, start, ends)
            else:
                outputs += self._write(active, branch, rows, start, ends, now, flight.n_top)
        return outputs

    def _embed(self, active: _Active, branch: Branch, hidden: np.ndarray, start: int, ends: bool) -> list[Output]:
        if active.pooling is None or start == 0:
            active.pooling = Pooling(self._pooling)
        active.pooling.add(hidden)
        if not ends:
            return []
        active.prompt_done = self._clock()
        output = Output(branch.request.id, finish_reason="stop", embedding=active.pooling.result())
        return self._finish(active, branch, output)

    def _write(
        self, active: _Active, branch: Branch, logits: np.ndarray, start: int, ends: bool, now: float, n_top: int
    ) -> list[Output]:
        if branch.all_rows:
            read_prompt(active.prompt_logprobs, branch.request, start, logits)
        if not ends:
            return []
        read, branch.all_rows = branch.all_rows, False
        if active.prompt_done is None:
            active.prompt_done = now
        outputs: list[Output] = []
        last = Candidates.of_top(logits[-1]) if n_top else logits[-1]
        for each in [branch, *self._fork(active, branch)]:
            writer = active.writers[each.index]
            spent, n_sampled = writer.sample_seconds, writer.n_sampled
            output = writer.write(last, each.n_past)
            output.prompt_logprobs = list(active.prompt_logprobs) if read else None
            self._counters.sample_seconds += writer.sample_seconds - spent
            self._counters.generated_tokens += writer.n_sampled - n_sampled
            if output.finish_reason is None:
                each.tokens += output.tokens
                outputs += self._give(active, output)
            else:
                outputs += self._finish(active, each, output)
        return outputs

    def _fork(self, active: _Active, branch: Branch) -> list[Branch]:
        """Return the other continuations of a prompt that has just been evaluated."""
        forks = []
        for index in range(1, branch.weight):
            key = (*branch.key[:2], index)
            other = Branch(branch.request, index, key, self.n_ctx, self._blocks.block_size)
            other.weight = 1
            branch.fork_into(other, self._blocks)
            self._scheduler.join(other)
            active.branches[index] = other
            active.writers[index] = self._writer(branch.request, index)
            forks.append(other)
        branch.weight = 1
        return forks

    # -- outputs ---------------------------------------------------------------------------------------------------

    def _finish(self, active: _Active, branch: Branch, output: Output) -> list[Output]:
        """Let a continuation leave; returns what can be given out."""
        self._complete(active, output)
        self._scheduler.remove(branch)
        del active.branches[branch.index]
        if active.branches:
            return self._give(active, output)
        del self._active[branch.request.id]
        self._counters.finished += 1
        outputs = self._give(active, output)
        if active.kept:
            best = sorted(active.kept.values(), key=lambda item: -item[0])[: active.request.params.n]
            outputs = [kept for _, kept in best]
            for index, kept in enumerate(outputs):
                kept.index = index
        outputs[-1].last = True
        return outputs

    def _give(self, active: _Active, output: Output) -> list[Output]:
        """Return an output, or keep it until the best continuations are known."""
        params = active.request.params
        if params.n_branches == params.n:
            return [output]
        writer = active.writers[output.index]
        if output.index in active.kept:
            _, kept = active.kept[output.index]
            output.text = kept.text + output.text
            output.tokens = kept.tokens + output.tokens
            output.logprobs = kept.logprobs + output.logprobs
            output.prompt_logprobs = kept.prompt_logprobs
        score = -np.inf if output.finish_reason == "error" else writer.mean_logprob
        active.kept[output.index] = (score, output)
        return []

    def _complete(self, active: _Active, output: Output) -> None:
        """Add usage and timings to a last output."""
        now = self._clock()
        writer = active.writers.get(output.index)
        branch = active.branches.get(output.index, active.branches[min(active.branches)])
        n_generated, sample = (writer.n_sampled, writer.sample_seconds) if writer else (0, 0.0)
        output.usage = Usage(len(active.request.prompt), max(0, branch.n_cached), n_generated)
        began = now if active.began is None else active.began
        prompt_done = now if active.prompt_done is None else active.prompt_done
        output.timings = Timings(
            queued=began - active.arrival,
            prompt=prompt_done - began,
            decode=now - prompt_done,
            sample=sample,
            ttft=prompt_done - active.arrival,
        )
