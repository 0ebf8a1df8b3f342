"""How fast a rank is, measured in about a second: what ``-ts auto`` cuts a model by."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mpillama.backends.base import Array, Backend, RawWeight
from mpillama.bench.weights import random_blocks
from mpillama.gguf.types import GGMLType, row_bytes

# A matrix as those of a model; several of them together are larger than the caches of a host.
_TYPE = GGMLType.Q8_0
_N_IN, _N_ROWS = 4096, 1024
_HOST_BYTES = 512 << 20
_BATCH = 64
# Ranks that differ by less are alike: noise should not make a ragged cut.
ALIKE = 0.10


@dataclass(frozen=True)
class Speed:
    """What a rank can do: 1e9 bytes of weights per second for one token, 1e9 multiply-adds per second for many."""

    read_gbps: float
    multiply_gmacs: float


def measure_speed(backend: Backend, n_sharers: int, seconds: float = 1.0) -> Speed:
    """Measure products with quantized matrices; the ``n_sharers`` ranks of a host should do so at the same time."""
    row = row_bytes(_TYPE, _N_IN)
    n_matrices = max(4, _HOST_BYTES // n_sharers // (row * _N_ROWS))
    raw = np.resize(random_blocks(_TYPE, 16381), (1, _N_ROWS, row // _TYPE.block_bytes, _TYPE.block_bytes))
    weight = RawWeight("speed", _TYPE, raw.reshape(1, _N_ROWS, row), _N_IN)
    matrices = [backend.weight(weight) for _ in range(n_matrices)]

    def rate(n_tokens: int) -> float:
        """Return matrices per second."""
        x = backend.asarray(np.ones((n_tokens, _N_IN), np.float32))
        return _rate(lambda i: backend.linear(x, matrices[i % n_matrices]), backend.to_host, seconds / 2)

    return Speed(rate(1) * row * _N_ROWS / 1e9, rate(_BATCH) * _BATCH * _N_IN * _N_ROWS / 1e9)


def _rate(call: Callable[[int], Array], finish: Callable[[Array], object], seconds: float) -> float:
    """Return calls per second, after a tenth of the time for warming up."""
    n, first, began = 0, 0, time.perf_counter()
    start = began
    while True:
        # Devices work ahead of the program; asking for a result makes it wait for them.
        finish(call(n))
        n += 1
        now = time.perf_counter()
        if not first and now - began > seconds / 10:
            first, start = n, now
        if now - began > seconds and n > first:
            return (n - first) / (now - start)


def shares_of(speeds: Sequence[Speed]) -> tuple[float, ...]:
    """Return the shares (sum 1) with which all ranks take the same time.

    A rank's time is the mean of its times for one token and for many, each relative to the mean of all ranks. Ranks
    that are alike within 10 % of the fastest of their kind get the same share.
    """
    reads = np.array([1.0 / speed.read_gbps for speed in speeds])
    multiplies = np.array([1.0 / speed.multiply_gmacs for speed in speeds])
    rates = 2.0 / (reads / reads.mean() + multiplies / multiplies.mean())
    shares = np.empty(len(rates))
    left = list(np.argsort(-rates, kind="stable"))
    while left:
        alike = [r for r in left if rates[r] >= rates[left[0]] * (1.0 - ALIKE)]
        shares[alike] = rates[alike].mean()
        left = left[len(alike) :]
    return tuple(float(share) for share in shares / shares.sum())
