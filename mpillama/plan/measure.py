"""Measuring what the cost model needs to know of CPUs and links: on all ranks at once, as they will have to share."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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

    Rates are those of the slowest rank: it is what all wait for.
    """
    _together(world)
    stream = _least(world, stream_gbps(backend, n_threads, world.local_size, 0.3))
    rates = {}
    for type in types:
        raw, mats = _matrices(backend, type, world.local_size)
        _together(world)
        # Largest times: those of the rank that all wait for.
        one = -_least(world, -_time_products(backend, mats, 1))
        many = -_least(world, -_time_products(backend, mats[:2], _PROMPT))
        flops = 2.0 * _ROWS * _IN * _PROMPT
        rates[type.name] = {"gbps": raw.nbytes / one / 1e9, "tflops": flops / many / 1e12}
    op_us, _ = _small_model(world, backend, alone=True)
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
        Microseconds of an op, and those of a collective beside them.
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

    def steps(n: int) -> float:
        """Return the seconds of a step on the slowest rank."""
        began = time.perf_counter()
        for _ in range(n):
            runner.run(batch)
        return -_least(world, -(time.perf_counter() - began)) / n

    steps(3)
    # As many on each rank, and not for long where ranks have to wait for a core.
    passed_us = 1e6 * steps(int(min(200.0, max(3.0, _SECONDS / steps(3)))))
    if alone:
        return passed_us / n_ops, 0.0
    return op_us, max(0.0, passed_us - n_ops * op_us) / max(1, n_collectives)
