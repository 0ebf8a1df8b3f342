"""Who takes part in the next step, and with how many tokens."""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from mpillama.backends.base import Batch
from mpillama.engine.blocks import BlockManager
from mpillama.engine.branch import Branch

_KEY = attrgetter("key")


@dataclass(frozen=True)
class Plan:
    """The next step.

    Attributes:
        parts: branches and how many of their pending tokens are computed.
        embedding: whether hidden states are wanted in place of logits; a step is all of one kind.
        n_rows: for each part, of how many tokens at its end results are wanted: of all, of the last, or none.
        batch: for the runner.
    """

    parts: list[tuple[Branch, int]]
    embedding: bool
    n_rows: list[int]
    batch: Batch


class Scheduler:
    """Chooses for each step within a budget of tokens: decoding first, then prompts in chunks, in order of their keys.

    A branch is admitted when there are blocks for all its tokens, and nothing behind the first that waits is let past
    it. Prompts that begin alike and come together wait until the first of them has computed what they share. When
    blocks run out, the running branch that is last in order is sent back to wait; its tokens are computed again later,
    as far as they are not in the prefix cache then. The first in order is never sent back while another runs, and the
    pool holds any one branch, so the first always ends.

    Steps are computed in the order of their plans, on every rank. So a plan may count on the KV of those before it as
    soon as they are made: parts of a prompt follow each other, and blocks go from one branch to the next, while
    earlier steps are in flight. A branch that waits for its next token takes no part, and nobody is sent back then.

    Args:
        blocks: of the KV cache.
        n_batch: tokens of a step at most, no less than n_parallel.
        n_parallel: sequences at a time.
        max_rows: tokens of a step at most whose logits are wanted because of logprobs of a prompt.
    """

    def __init__(self, blocks: BlockManager, n_batch: int, n_parallel: int, max_rows: int) -> None:
        self._max_rows = max_rows
        self.blocks, self.n_batch, self.n_parallel = blocks, n_batch, n_parallel
        self.waiting: list[Branch] = []
        self.running: list[Branch] = []
        self.n_preemptions = 0
        self._embedded_last = False

    def add(self, branch: Branch) -> None:
        """Let a branch wait for its turn."""
        insort(self.waiting, branch, key=_KEY)

    def join(self, branch: Branch) -> None:
        """Let a branch run at once that was forked from a running one, whose weight has kept a place for it."""
        insort(self.running, branch, key=_KEY)

    def remove(self, branch: Branch) -> None:
        """Forget a branch and free its blocks."""
        (self.running if branch in self.running else self.waiting).remove(branch)
        branch.end(self.blocks)

    def plan(self, share: int = 1) -> Plan | None:
        """Return the next step, None if there is nothing to do.

        Args:
            share: steps among which to divide the branches that decode, so that all can be in flight at once.
        """
        if not self.running:
            self._admit()
        kinds = sorted({branch.embedding for branch in self.running})
        if len(kinds) == 2 and not self._embedded_last:
            kinds.reverse()
        for embedding in kinds:
            parts = self._fill(embedding, share)
            if parts:
                self._embedded_last = embedding
                return self._as_plan(parts, embedding)
        return None

    def _fill(self, embedding: bool, share: int) -> list[tuple[Branch, int]]:
        parts: list[tuple[Branch, int]] = []
        if not embedding:
            decoding = [branch for branch in self.running if branch.pending == 1 and not branch.embedding]
            for branch in decoding[: -(-len(decoding) // share)]:
                if branch in self.running and self._make_room(branch):
                    parts.append((branch, 1))
        self._admit()
        budget, max_rows = self.n_batch - len(parts), self._max_rows
        for branch in self.running:
            if branch.embedding != embedding or (branch.pending == 1 and not embedding):
                continue
            n = min(budget, branch.pending)
            if branch.all_rows and not embedding:
                n = min(n, max_rows)
                max_rows -= n
            if n:
                parts.append((branch, n))
                budget -= n
        return parts

    def _make_room(self, branch: Branch) -> bool:
        """See to it that a branch has room for one more token; False if it cannot take part."""
        if not branch.needs_block(self.blocks):
            return True
        while not self.blocks.n_available:
            if any(other.in_flight for other in self.running):
                return False
            victim = self.running[-1]
            self._preempt(victim)
            if victim is branch:
                return False
            if not branch.needs_block(self.blocks):
                return True
        branch.grow(self.blocks)
        return True

    def _preempt(self, branch: Branch) -> None:
        self.running.remove(branch)
        branch.end(self.blocks)
        self.add(branch)
        self.n_preemptions += 1

    def _admit(self) -> None:
        n_running = sum(branch.weight for branch in self.running)
        while self.waiting and n_running + self.waiting[0].weight <= self.n_parallel:
            # Each of those that run may soon need a block more; without this the newcomer would be sent back at once.
            if not self.waiting[0].begin(self.blocks, reserve=len(self.running)):
                return
            branch = self.waiting.pop(0)
            insort(self.running, branch, key=_KEY)
            n_running += branch.weight

    def _as_plan(self, parts: list[tuple[Branch, int]], embedding: bool) -> Plan:
        lens = [n for _, n in parts]
        n_rows = [n if branch.all_rows else int(n == branch.pending) for branch, n in parts]
        tables = [branch.table for branch, _ in parts]
        block_tables = np.full((len(parts), max(map(len, tables))), -1, np.int32)
        for row, table in zip(block_tables, tables, strict=True):
            row[: len(table)] = table
        tokens: list[int] = []
        for branch, n in parts:
            tokens += branch.tokens[branch.n_past : branch.n_past + n]
        ends = np.cumsum(lens)
        rows = [row for end, n in zip(ends.tolist(), n_rows, strict=True) for row in range(end - n, end)]
        starts = np.array([branch.n_past for branch, _ in parts]) - ends + lens
        positions = np.arange(ends[-1]) + np.repeat(starts, lens)
        batch = Batch(
            tokens=np.array(tokens, np.int32),
            positions=positions.astype(np.int32),
            seq_lens=np.array(lens, np.int32),
            block_tables=block_tables,
            logit_rows=np.array(rows, np.int32),
            copies=self.blocks.take_copies(),
            embedding=embedding,
        )
        return Plan(parts, embedding, n_rows, batch)
