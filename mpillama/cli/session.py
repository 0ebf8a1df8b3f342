"""From a command line to a loaded model: what `generate` and `logits` share."""

from __future__ import annotations

import os
import resource
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from threadpoolctl import threadpool_limits

from mpillama.backends import make_backend
from mpillama.backends.attention import check_cache_type
from mpillama.backends.base import Backend
from mpillama.backends.reference import ReferenceBackend
from mpillama.cli.memory import fit_memory
from mpillama.cli.progress import JointProgress, Log, format_bytes
from mpillama.comm.base import World, attempt, from_root, settle
from mpillama.config import Config, RopeOverrides, read_config
from mpillama.data import demo_model_path
from mpillama.errors import UsageError, UserError
from mpillama.gguf.reader import GGUFHeader, TensorInfo, read_header
from mpillama.layout import check_weights
from mpillama.loader import check_types, load_weights
from mpillama.ops import Ops
from mpillama.runner import Runner, kv_bytes
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What every rank must know of a model to load its slices; small, and broadcast by rank 0.

    Attributes:
        weights: each rank's share.
        n_ctx: tokens of one sequence at most.
        n_kv: tokens that the KV cache should hold; with less than ``n_kv_min`` the model is not loaded.
    """

    paths: tuple[str, ...]
    cfg: Config
    tensors: dict[str, TensorInfo]
    weights: tuple[float, ...]
    n_ctx: int
    n_kv: int
    n_kv_min: int


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run on this rank, and how long that took in seconds."""

    model: Model
    runner: Runner
    seconds: float


def model_path(args: Namespace) -> Path:
    """Return the model file that the flags name (fetching it with ``-hf``); without any, the demo model."""
    if args.hf_repo:
        from mpillama.cli.hub import resolve_hf

        return resolve_hf(args.hf_repo, args.hf_file, args.hf_token, args.offline)
    return Path(args.model) if args.model else demo_model_path()


def open_model(args: Namespace, n_ranks: int) -> tuple[GGUFHeader, Model]:
    """Rank 0: read and check the header and everything that can be checked without the weights.

    Raises:
        UserError: the file, a flag, or their combination is wrong.
    """
    if args.split_mode == "none" and n_ranks > 1:
        raise UsageError(f"-sm none runs on one rank but there are {n_ranks}; start one, or use -sm tensor")
    weights = check_weights(args.tensor_split or (), n_ranks)
    header = read_header(model_path(args))
    for key, value in args.override_kv:
        header.metadata[key] = value  # type: ignore[index]
    overrides = RopeOverrides(
        scaling=args.rope_scaling,
        freq_base=args.rope_freq_base or None,
        freq_scale=args.rope_freq_scale or None,
        ext_factor=args.yarn_ext_factor,
        attn_factor=args.yarn_attn_factor,
        beta_fast=args.yarn_beta_fast,
        beta_slow=args.yarn_beta_slow,
        orig_ctx=args.yarn_orig_ctx or None,
    )
    cfg = read_config(header, args.ctx_size, overrides)
    check_cache_type("keys", args.cache_type_k, cfg.n_embd_head_k)
    check_cache_type("values", args.cache_type_v, cfg.n_embd_head_v)
    tensors = model_tensors(header, cfg)
    check_types(tensors.values(), ReferenceBackend())
    n_ctx = args.ctx_size or cfg.n_ctx_train
    return header, Model(header.paths, cfg, tensors, weights, n_ctx, n_ctx, n_ctx)


def load(args: Namespace, world: World, log: Log, make: Callable[[], tuple[Model, T]]) -> tuple[Loaded, T | None]:
    """Let rank 0 ``make`` the model's description and its own working set; load the weights on every rank.

    Returns:
        The loaded model, and on rank 0 what else ``make`` returned.
    """
    began = time.perf_counter()
    own: list[T] = []

    def describe() -> Model:
        model, other = make()
        own.append(other)
        return model

    model = from_root(world, describe)
    backend, threads = settle(world, attempt(lambda: open_backend(args, world)))
    sharding = Sharding(model.cfg, model.weights)
    infos = list(model.tensors.values())
    shares = [sharding.bytes_of(infos, rank) for rank in range(world.size)]
    kv_types = (args.cache_type_k, args.cache_type_v)
    kv = [kv_bytes(model.cfg, sharding, rank, model.n_kv, *kv_types) for rank in range(world.size)]
    n_kv = fit_memory(world, shares, kv, model.n_kv, model.n_kv_min)
    kv = [kv_bytes(model.cfg, sharding, rank, n_kv, *kv_types) for rank in range(world.size)]
    with JointProgress(world, shares, enabled=log.interactive) as bar:
        reading = attempt(lambda: load_weights(model.paths, model.tensors, sharding, world.rank, backend, bar.update))
        if isinstance(reading, UserError):
            bar.give_up()
    weights, n_read = settle(world, reading)
    n_head_kv = sharding.cuts["k"].width(world.rank) // model.cfg.n_embd_head_k
    runner = Runner(model.cfg, weights, Ops(backend, world.group()), n_head_kv, n_kv, *kv_types)
    everyone = world.bcast(world.gather((n_read, peak_memory())))
    log.info(_layout_line(world, backend.name, threads, model, shares, kv, n_kv))
    for rank, (n_read_there, peak) in enumerate(everyone):
        log.verbose(
            f"rank {rank} on {world.hosts[rank]}: share {format_bytes(shares[rank])}, "
            f"read {format_bytes(n_read_there)}, KV {format_bytes(kv[rank])}, peak memory {format_bytes(peak)}"
        )
    n_file = sum(info.nbytes for info in {(i.part, i.offset): i for i in infos}.values())
    log.verbose(
        f"read in all: {format_bytes(sum(n for n, _ in everyone))} of {format_bytes(n_file)} of tensors in the file"
    )
    return Loaded(model, runner, time.perf_counter() - began), own[0] if own else None


def _layout_line(
    world: World, backend: str, threads: int, model: Model, shares: list[int], kv: list[int], n_kv: int
) -> str:
    n_hosts = len(set(world.hosts))
    total = sum(model.weights)
    split = ",".join(f"{100 * weight / total:.3g}" for weight in model.weights)
    low, high = min(shares), max(shares)
    per_rank = format_bytes(high) if low == high else f"{format_bytes(low)} to {format_bytes(high)}"
    each = " each" if world.size > 1 else ""
    return (
        f"layout: {_count(world.size, 'rank')} on {_count(n_hosts, 'host')}, {backend} backend with "
        f"{_count(threads, 'thread')}{each}, tensor split {split} %, weights {per_rank} per rank, "
        f"KV {format_bytes(max(kv))} for {n_kv} tokens"
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def open_backend(args: Namespace, world: World) -> tuple[Backend, int]:
    """Return this rank's backend and its number of threads.

    ``MPILLAMA_CPU_LEVEL`` names the instruction sets that the cpu backend may use.

    Raises:
        UsageError: the backend or the level is not there.
    """
    threads, cores = place_threads(world, args.threads)
    threadpool_limits(threads)
    return make_backend(args.backend, threads, cores, os.environ.get("MPILLAMA_CPU_LEVEL", "")), threads


def limit_threads(world: World, wanted: int) -> int:
    """Set and return the rank's number of CPU threads for NumPy; see `place_threads`."""
    threads, _ = place_threads(world, wanted)
    threadpool_limits(threads)
    return threads


def place_threads(world: World, wanted: int) -> tuple[int, tuple[int, ...]]:
    """Return the rank's number of CPU threads, and the cores that they should be pinned to.

    By default a rank has its share of the cores that it may run on; ranks that a launcher has bound to different cores
    each use all of their own. Threads are pinned only within cores that someone has set aside for this job: a job that
    may run anywhere may have to share the machine, and must be able to evade.
    """
    cores = tuple(sorted(os.sched_getaffinity(0)))
    everyone = world.bcast(world.gather((world.hosts[world.rank], cores)))
    here = [(rank, others) for rank, (host, others) in enumerate(everyone) if host == world.hosts[world.rank]]
    sharers = [(rank, others) for rank, others in here if set(others) & set(cores)]
    threads = wanted if wanted > 0 else max(1, len(cores) // len(sharers))
    alike = all(others == cores for _, others in sharers)
    if len(cores) == os.cpu_count() or not alike or threads * len(sharers) > len(cores):
        return threads, ()
    first = [rank for rank, _ in sharers].index(world.rank) * threads
    return threads, cores[first : first + threads]


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
