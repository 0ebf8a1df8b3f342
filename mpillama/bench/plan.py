"""What a benchmark runs: the cross product of settings, in an order that loads a model as seldom as possible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from mpillama.backends.base import KV_BLOCK


@dataclass(frozen=True)
class Test:
    """One workload: evaluate ``n_prompt`` tokens, then generate ``n_gen``, after ``n_depth`` that are not timed.

    ``n_parallel`` sequences do so at once, with as many tokens each.
    """

    __test__ = False  # pytest takes classes of this name for its own

    n_prompt: int
    n_gen: int
    n_depth: int = 0
    n_parallel: int = 1

    @property
    def name(self) -> str:
        """Its name in llama-bench's tables: ``pp512``, ``tg128``, ``pp512+tg128 @ d4096``; ``tg64 x 16`` of several."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        depth = f" @ d{self.n_depth}" if self.n_depth else ""
        return "+".join(parts) + depth + (f" x {self.n_parallel}" if self.n_parallel > 1 else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that are timed, of all sequences."""
        return self.n_parallel * (self.n_prompt + self.n_gen)

    @property
    def n_ctx(self) -> int:
        """Tokens that the KV cache must hold."""
        n = self.n_prompt + self.n_gen + self.n_depth
        # Blocks are not shared by sequences.
        return n if self.n_parallel == 1 else self.n_parallel * -(-n // KV_BLOCK) * KV_BLOCK


@dataclass(frozen=True)
class Load:
    """What cannot change without loading again.

    Attributes:
        model: a file's name, or ``SHAPE[:TYPE]`` if ``random``.
        tensor_split: a share for each rank; empty for equal ones, ``auto`` or ``memory`` for what the ranks find out.
        n_threads: of each rank, as asked for; 0 or less for a rank's share of its host.
    """

    model: str
    random: bool
    tensor_split: tuple[float, ...] | str
    n_threads: int


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    load: Load
    n_batch: int
    n_ubatch: int
    type_k: str
    type_v: str
    test: Test


def workloads(
    n_prompt: Sequence[int],
    n_gen: Sequence[int],
    n_pg: Sequence[tuple[int, int]],
    n_depth: Sequence[int],
    n_parallel: Sequence[int] = (1,),
) -> list[Test]:
    """Return the workloads of ``-p``, ``-n`` and ``-pg`` at each depth and width; a length of 0 stands for none."""
    pairs = [(n, 0) for n in n_prompt] + [(0, n) for n in n_gen] + list(n_pg)
    return [Test(pp, tg, depth, width) for width in n_parallel for depth in n_depth for pp, tg in pairs if pp + tg]


def cases(
    loads: Sequence[Load],
    n_batch: Sequence[int],
    n_ubatch: Sequence[int],
    type_k: Sequence[str],
    type_v: Sequence[str],
    tests: Sequence[Test],
) -> list[Case]:
    """Return the cross product; what is expensive to change comes first and so changes least."""
    # KV types before batch sizes: a cache is filled again when they change.
    found = product(loads, type_k, type_v, n_batch, n_ubatch, tests)
    return [Case(load, b, ub, k, v, test) for load, k, v, b, ub, test in found]
