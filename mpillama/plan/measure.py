"""Measuring what the cost model needs to know of CPUs and links: on all ranks at once, as they will have to share."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from mpillama.backends.base import Backend, RawWeight
from mpillama.bench.shapes import shape_header
from mpillama.bench.stream import stream_gbps
from mpillama.bench.weights import RANDOM_TYPES, random_blocks, random_weights
from mpillama.comm.base import Group, World
from mpillama.comm.solo import SoloGroup
from mpillama.gguf.types import GGMLType
from mpillama.ops import Ops
from mpillama.plan.walk import PlanModel, step_batch, walk
from mpillama.runner import Runner
from mpillama.sharding import Sharding

# A product of the size that models have; as many matrices as no cache holds.
_ROWS, _IN, _ALL_BYTES = 4096, 2048, 192 << 20
_PROMPT = 256
_SECONDS = 0.25
# A model whose products take no time to speak of: what is left is the cost of starting ops.
_SMALL = "tiny:Q8_0"


def measure_device(world: World, backend: Backend, n_threads: int, types: Sequence[GGMLType]) -> dict[str, Any]:
    """Return the ``device`` table of a cluster file, without its memory; called by all ranks together, told on rank 0.

    Rates are those of the slowest rank, which all wait for; where ranks have to share cores, the mean of all, since a
    rank that is done early leaves its core to the rest.
    """
    crowded = _crowded(world, n_threads)
    stream = _joint(world, stream_gbps(backend, n_threads, world.local_size, 0.3), crowded)
    rates = {}
    for type in types:
        raw, mats = _matrices(backend, type, world.local_size)
        _together(world)
        one = _joint(world, 1 / _time_products(backend, mats, 1), crowded)
        many = _joint(world, 1 / _time_products(backend, mats[:2], _PROMPT), crowded)
        rates[type.name] = {"gbps": raw.nbytes * one / 1e9, "tflops": 2.0 * _ROWS * _IN * _PROMPT * many / 1e12}
    op_us = 1 / _joint(world, 1 / _small_model(world, backend, alone=True)[0], crowded)
    device: dict[str, Any] = {
        "name": "cpu",
        "memory_gbps": stream,
        "memory_reach": 1.0,
        "matrix_tflops": max((rate["tflops"] for rate in rates.values()), default=0.1),
        "matrix_reach": 1.0,
        "op_us": op_us,
        "types": rates,
    }
    if world.size > 1:
        _, collective_us = _small_model(world, backend, alone=False, op_us=op_us)
        device["collective_us"] = collective_us
    return device


def measure_within(world: World, n_bytes: int) -> tuple[float, float]:
    """Return the seconds of an allreduce of two numbers and of ``n_bytes`` over the ranks of a host, as runs have it.

    Called by all ranks together, and told on all; the slowest rank's.
    """
    here = [rank for rank, host in enumerate(world.hosts) if host == world.hosts[world.rank]]
    group: Group = world.group(here)

    def seconds(n: int) -> float:
        values = np.zeros(n, np.float32)

        def once(times: int) -> float:
            _together(world)
            began = time.perf_counter()
            for _ in range(times):
                group.allreduce(values)
            return -_least(world, -(time.perf_counter() - began)) / times

        once(3)
        return once(int(min(2000.0, max(5.0, _SECONDS / once(5)))))

    return seconds(2), seconds(n_bytes // 4)


def fit_link(n_ranks: int, small: float, large: float, large_bytes: int) -> dict[str, float]:
    """Return latency and bandwidth with which `allreduce_seconds` gives the measured times of two sizes.

    Args:
        n_ranks: of the allreduce.
        small: seconds of an allreduce of a few bytes.
        large: seconds of one of ``large_bytes``, which goes by reduce-scatter and allgather.
    """
    rounds = (n_ranks - 1).bit_length()
    alpha = small / rounds
    rest = max(large - 2 * rounds * alpha, large / 10)
    return {"latency_us": alpha * 1e6, "gbps": 2 * (n_ranks - 1) / n_ranks * large_bytes / rest / 1e9}


def measurable(model: PlanModel) -> list[GGMLType]:
    """Return the types of a model's matrices that random weights can have, the commonest first."""
    sizes: dict[GGMLType, int] = {}
    for info in model.tensors.values():
        if len(info.shape) > 1 and info.type in RANDOM_TYPES:
            sizes[info.type] = sizes.get(info.type, 0) + info.nbytes
    return sorted(sizes, key=lambda type: -sizes[type])


def _together(world: World) -> None:
    world.bcast(world.gather(None))


def _crowded(world: World, n_threads: int) -> bool:
    """Return whether the threads of a host's ranks are more than the cores that they may run on; all start together."""
    everyone = world.gather((world.hosts[world.rank], n_threads, os.sched_getaffinity(0)))

    def more_than_cores(host: str) -> bool:
        here = [(n, cores) for other, n, cores in everyone if other == host]
        return sum(n for n, _ in here) > len(set().union(*(cores for _, cores in here)))

    return bool(world.bcast(any(more_than_cores(host) for host, _, _ in everyone)))


def _joint(world: World, rate: float, crowded: bool) -> float:
    """Return the rate at which ranks get on that all have to do the same, from that of each."""
    rates = world.gather(rate) or [rate]
    return float(world.bcast(fmean(rates) if crowded else min(rates)))


def _least(world: World, value: float) -> float:
    return float(world.bcast(min(world.gather(value), default=value)))


def _matrices(backend: Backend, type: GGMLType, n_sharers: int) -> tuple[np.ndarray, list[Any]]:
    """Return a matrix as a file has it, and copies of it in the backend's form that are larger than a cache."""
    blocks = random_blocks(type, _ROWS * _IN // type.block_size)
    raw = blocks.reshape(1, _ROWS, -1)
    n = max(4, _ALL_BYTES // n_sharers // raw.nbytes)
    return raw, [backend.weight(RawWeight("w", type, raw.copy(), _IN)) for _ in range(n)]


def _time_products(backend: Backend, mats: Sequence[Any], n_tokens: int) -> float:
    """Return the seconds of a product with one of the matrices in turn."""
    x = backend.asarray(np.ones((n_tokens, _IN), np.float32))
    turn = 0

    def product() -> None:
        nonlocal turn
        backend.linear(x, mats[turn % len(mats)])
        turn += 1

    return _repeat(product, len(mats) if n_tokens == 1 else 1)


def _repeat(action: Callable[[], object], warm_up: int, seconds: float = _SECONDS) -> float:
    for _ in range(warm_up):
        action()
    began, n = time.perf_counter(), 0
    while (passed := time.perf_counter() - began) < seconds:
        action()
        n += 1
    return passed / n


def _small_model(world: World, backend: Backend, alone: bool, op_us: float = 0.0) -> tuple[float, float]:
    """Run a small model, each rank alone or all together.

    Returns:
        Microseconds of an op (of this rank, if alone), and those of a collective beside them.
    """
    size, rank = (1, 0) if alone else (world.size, world.rank)
    group: Group = SoloGroup() if alone else world.group()
    model = PlanModel(_SMALL, shape_header(_SMALL), 64)
    sharding = Sharding(model.cfg, (1.0,) * size)
    weights = random_weights(model.tensors, sharding, rank, backend)
    n_head_kv = sharding.cuts["k"].width(rank) // model.cfg.n_embd_head_k
    runner = Runner(model.cfg, weights, Ops(backend, group), n_head_kv, 64, "f16", "f16")
    batch = step_batch(1, 1, 8)
    events = list(walk(model, sharding, rank, batch, "f16", "f16").all(model))
    n_ops = sum(times for event, times in events if not event.is_collective)
    n_collectives = sum(times for event, times in events if event.is_collective)
    _together(world)

    def steps(n: int) -> tuple[float, float]:
        """Return the seconds of a step on this rank, and on the slowest one."""
        began = time.perf_counter()
        for _ in range(n):
            runner.run(batch)
        own = (time.perf_counter() - began) / n
        return own, -_least(world, -own)

    steps(3)
    # As many on each rank, and not for long where ranks have to wait for a core.
    own, slowest = steps(int(min(200.0, max(3.0, _SECONDS / steps(3)[1]))))
    if alone:
        return 1e6 * own / n_ops, 0.0
    return op_us, max(0.0, 1e6 * slowest - n_ops * op_us) / max(1, n_collectives)
