"""Whole experts or slices of each: which of the two costs the slowest rank of a stage less.

Cut into slices, the ranks read the same share of every chosen expert: even work, but a slice that ends inside a quant
block is computed with the whole block. Kept whole, no block is computed twice, but the experts of a token may fall on
few ranks. Costs are those of the slowest rank, relative to a perfectly even division of the same work by shares:

- slices: the largest share of the bytes of an expert that a rank holds, for one token as for many;
- whole experts, one token: the mean, over all choices of experts, of the most that fall on one rank;
- whole experts, many tokens: the largest number of experts that a rank holds.

Generating (one token) and reading a prompt (many) count the same: whole experts are taken where the sum of their two
costs is less than twice that of slices. In practice that is where slices are narrower than the blocks of a type.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from mpillama.config import Config
from mpillama.gguf.reader import TensorInfo
from mpillama.sharding import Sharding

MODES = ("auto", "on", "off")


def expected_max(counts: Sequence[int], n_used: int, weights: Sequence[float]) -> float:
    """Return the mean of the largest load / weight of a rank, if ``n_used`` different experts are chosen evenly.

    Exact: the choices in which no rank r has more than m_r are counted by the product over r of the polynomials
    sum_(j <= m_r) C(counts[r], j) x^j, at x^n_used (multivariate hypergeometric distribution).
    """
    ranks = [(n, w) for n, w in zip(counts, weights, strict=True) if n]
    values = sorted({0.0, *(j / w for n, w in ranks for j in range(1, min(n, n_used) + 1))})
    n_all = math.comb(sum(n for n, _ in ranks), n_used)

    def at_most(value: float) -> float:
        ways = [1] + [0] * n_used
        for n, w in ranks:
            row = [math.comb(n, j) for j in range(min(n, n_used, math.floor(value * w + 1e-9)) + 1)]
            ways = [sum(row[j] * ways[k - j] for j in range(min(k + 1, len(row)))) for k in range(n_used + 1)]
        return ways[n_used] / n_all

    steps = pairwise(values)
    return sum((high - low) * (1.0 - at_most(low)) for low, high in steps)


def whole_expert_blocks(
    cfg: Config, tensors: Iterable[TensorInfo], weights: Sequence[float], mode: str = "auto"
) -> frozenset[int]:
    """Return the blocks whose experts should stay whole: all (``on``), none (``off``), or where it costs less."""
    if not cfg.n_expert or mode == "off" or len(weights) == 1:
        return frozenset()
    if mode == "on":
        return frozenset(range(cfg.n_layer))
    shares = [w / sum(weights) for w in weights]
    sliced = Sharding(cfg, weights)
    counts = [sliced.cuts["expert"].width(rank) for rank in range(len(weights))]
    if any(n and not share for n, share in zip(counts, shares, strict=True)):
        return frozenset()
    one = expected_max(counts, cfg.n_expert_used, shares) / cfg.n_expert_used
    many = max(n / share for n, share in zip(counts, shares, strict=True) if n) / cfg.n_expert
    by_block: dict[int, list[TensorInfo]] = {}
    for info in tensors:
        if "_exps.weight" in info.name:
            by_block.setdefault(int(info.name.split(".")[1]), []).append(info)
    found = set()
    for il, infos in by_block.items():
        total = sum(info.nbytes for info in infos)
        slices = max(
            sum(sliced.slice_of(info, rank).nbytes for info in infos) / share / total
            for rank, share in enumerate(shares)
            if share
        )
        if one + many < 2 * slices:
            found.add(il)
    return frozenset(found)
