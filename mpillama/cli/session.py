"""From a command line to a loaded model: what `generate` and `logits` share."""

from __future__ import annotations

import gc
import os
import resource
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

from threadpoolctl import threadpool_limits

from mpillama.backends import make_backend
from mpillama.backends.base import Backend
from mpillama.backends.gpu.backend import GpuBackend
from mpillama.backends.gpu.cache import user_cache
from mpillama.backends.kv_codec import check_cache_type
from mpillama.backends.reference import ReferenceBackend
from mpillama.cli.devices import choose_device, devices_of, kinds_of
from mpillama.cli.loading import choose_loading, read_watch
from mpillama.cli.memory import WORKSPACE, fit_memory, fits_easily
from mpillama.cli.progress import JointProgress, Log
from mpillama.cli.shares import choose_shares
from mpillama.cli.words import layout_line, reading_lines
from mpillama.comm.base import Group, Team, World, attempt, from_root, settle
from mpillama.comm.metered import MeteredGroup, Traffic
from mpillama.comm.nccl import Collectives, device_group
from mpillama.comm.pipeline import Pipe, open_pipe
from mpillama.comm.staged import tensor_group
from mpillama.comm.virtual import VIRTUAL_RANKS, Crew
from mpillama.config import Config, RopeOverrides, read_config
from mpillama.data import demo_model_path
from mpillama.errors import PeerFailure, UsageError, UserError
from mpillama.gguf.reader import GGUFHeader, TensorInfo, read_header
from mpillama.grid import ONE_RANK, Grid, choose_grid, host_replicas
from mpillama.layout import apportion
from mpillama.loader import SliceReader, Source, check_types, take_weights
from mpillama.ops import Ops
from mpillama.partition import Partition
from mpillama.relay import Relay
from mpillama.runner import Runner, VirtualRunner, kv_bytes
from mpillama.state.sequence import KVPlace
from mpillama.tensors import model_tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Model:
    """What every rank must know of a model to load its slices; small, and broadcast by rank 0.

    Attributes:
        n_ctx: tokens of one sequence at most.
        n_kv: tokens that the KV cache should hold; with less than ``n_kv_min`` the model is not loaded.
        grid: of the ranks; it and ``weights``, a share for each rank, become known when the ranks have met.
        weights: see ``grid``; of the ranks of a replica.
    """

    paths: tuple[str, ...]
    cfg: Config
    tensors: dict[str, TensorInfo]
    n_ctx: int
    n_kv: int
    n_kv_min: int
    grid: Grid = ONE_RANK
    weights: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to run on this rank, and how long that took in seconds.

    ``n_read`` are the bytes that all ranks have read, and ``reading`` the seconds until they had them.
    ``team`` are the ranks of its replica, ``places`` their parts of the KV; empty where there are virtual ranks.
    ``traffic`` counts this rank's collectives, but those of virtual ranks.
    """

    model: Model
    runner: Runner
    seconds: float
    n_read: int
    reading: float
    team: Team
    places: tuple[KVPlace, ...] = ()
    traffic: Traffic = field(default_factory=Traffic)


def model_path(args: Namespace) -> Path:
    """Return the model file that the flags name (fetching it with ``-hf``); without any, the demo model."""
    if args.hf_repo:
        from mpillama.cli.hub import resolve_hf

        return resolve_hf(args.hf_repo, args.hf_file, args.hf_token, args.offline)
    return Path(args.model) if args.model else demo_model_path()


def open_header(args: Namespace, path: Path) -> GGUFHeader:
    """Read the header of a model file, with what the flags override.

    Raises:
        UserError: the file is wrong.
    """
    header = read_header(path)
    for key, value in args.override_kv:
        header.metadata[key] = value  # type: ignore[index]
    return header


def open_model(args: Namespace, n_ranks: int) -> tuple[GGUFHeader, Model]:
    """Rank 0: read and check the header and everything that can be checked without the weights.

    Raises:
        UserError: the file, a flag, or their combination is wrong.
    """
    header = open_header(args, model_path(args))
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
    return header, Model(header.paths, cfg, tensors, n_ctx, n_ctx, n_ctx)


@contextmanager
def _no_collections() -> Iterator[None]:
    """Keep Python from looking for garbage among half a million tokens and merges, again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collections()
def load(
    args: Namespace, world: World, log: Log, make: Callable[[], tuple[Model, T]], replicas: bool = False
) -> tuple[Loaded, T | None]:
    """Let rank 0 ``make`` the model's description and its own working set; load the weights on every rank.

    With ``replicas`` there may be several of the model.

    Returns:
        The loaded model, and on rank 0 what else ``make`` returned.
    """
    began = time.perf_counter()
    own: list[T] = []

    def describe() -> Model:
        named = {name for name, _ in devices_of(args, world.hosts)}
        if args.deterministic and len(named) > 1:
            raise UsageError("--deterministic needs the same backend on all ranks: name one with --backend")
        model, other = make()
        own.append(other)
        if args.deterministic:
            return replace(model, grid=_deterministic_grid(args, world.size))
        return replace(model, grid=grid_of(args, world.hosts, model.cfg.n_layer, replicas))

    model = from_root(world, describe)
    backend, threads, gpu = settle(world, attempt(lambda: open_backend(args, world, one_thread=args.deterministic)))
    kinds = kinds_of(world, backend, gpu)
    room, work = _device_memory(args, model, backend, world.size)
    if replicas and _leaves_layout_open(args) and _fit_into_hosts(args, world, model, room, work):
        model = replace(model, grid=host_replicas(world.hosts))
    model = replace(model, weights=choose_shares(args.tensor_split, world, model.grid, backend))
    virtual = virtual_ranks(model.weights) if args.deterministic else None
    grid, weights = (Grid(VIRTUAL_RANKS), (1.0,) * VIRTUAL_RANKS) if virtual else (model.grid, model.weights)
    partition = Partition(model.cfg, model.tensors, grid, weights, args.ep)
    slices = virtual or [range(rank, rank + 1) for rank in range(world.size)]
    shares = [sum(partition.bytes_of(i) for i in here) for here in slices]
    kv_types = (args.cache_type_k, args.cache_type_v)

    def kv_shares(n_kv: int) -> list[int]:
        """Return the bytes of each rank's KV cache."""
        return [sum(kv_bytes(model.cfg, *partition.of(i), n_kv, *kv_types) for i in here) for here in slices]

    n_kv = fit_memory(world, shares, kv_shares(model.n_kv), model.n_kv, model.n_kv_min, room, work, log.info)
    if n_kv < model.n_kv:
        tell = log.report if args.ctx_size else log.info
        tell(f"the memory holds a context of {n_kv} tokens, where {model.n_kv} were asked for")
    model = replace(model, n_kv=n_kv, n_ctx=min(model.n_ctx, n_kv))
    kv = kv_shares(n_kv)
    settle(world, attempt(lambda: check_types(model.tensors.values(), backend)))
    loading = choose_loading(args.load, world, model.paths, virtual is not None)
    watch, start = read_watch(world), time.perf_counter()
    team = _team(world, model.grid)
    traffic = Traffic()
    with JointProgress(world, shares, enabled=log.interactive) as bar:

        def source() -> Source:
            if loading == "bcast":
                return Relay(world, model.paths, model.tensors.values(), partition, bar.update, watch)
            return SliceReader(model.paths, bar.update, watch)

        if virtual:
            crew = Crew(world.group(), [len(here) for here in virtual])
            backends = [backend, *(_another(backend) for _ in virtual[world.rank][1:])]
            parts = [
                (i, Ops(member, tensor_group(group, member)), Pipe())
                for i, member, group in zip(virtual[world.rank], backends, crew.groups(), strict=True)
            ]
        else:
            group = stage_group(args, team, model.grid.one_replica, backend, gpu, model.grid.dp > 1)
            if group.size > 1:
                group = metered = MeteredGroup(group)
                traffic = metered.traffic
            ops = Ops(backend, group, kinds.alike(model.grid.stage_ranks(world.rank)))
            parts = [(world.rank, ops, open_pipe(team, model.grid.one_replica))]
        outcome = attempt(lambda: [open_runner(model, partition, *part, kv_types, source()) for part in parts])
        if isinstance(outcome, UserError):
            bar.give_up()
    watch.close()
    members = settle(world, outcome)
    runner = VirtualRunner([runner for runner, _ in members], crew) if virtual else members[0][0]
    n_read = sum(n for _, n in members)
    everyone = world.bcast(world.gather((n_read, peak_memory(), time.perf_counter() - start)))
    n_read, reading = sum(n for n, _, _ in everyone), max(seconds for _, _, seconds in everyone)
    hosts, read = world.hosts, [(n, peak) for n, peak, _ in everyone]
    log.info(layout_line(hosts, kinds, threads, model.grid, model.weights, partition, shares, kv, model.n_kv))
    for line in reading_lines(hosts, shares, kv, read, model.tensors.values(), reading, loading):
        log.verbose(line)
    n_k = model.cfg.n_embd_head_k
    places = tuple(KVPlace.of(*partition.of(rank), n_k) for rank in range(0 if virtual else team.size))
    seconds = time.perf_counter() - began
    return Loaded(model, runner, seconds, n_read, reading, team, places, traffic), own[0] if own else None


def grid_of(args: Namespace, hosts: Sequence[str], n_layer: int, replicas: bool = False) -> Grid:
    """Return the grid of a command that runs a single replica, or with ``replicas`` as many as the flags say.

    Raises:
        UsageError: there is no such grid of these ranks, or the flags ask for replicas that the command cannot use.
    """
    if (args.dp or 1) > 1 and not replicas:
        raise UsageError(
            f"--dp {args.dp}: replicas answer the many requests of mpillama batch and mpillama serve; this command has "
            "use for one: leave --dp out"
        )
    return choose_grid(hosts, n_layer, split_mode=args.split_mode, tp=args.tp, pp=args.pp, dp=args.dp)


def _leaves_layout_open(args: Namespace) -> bool:
    given = (args.split_mode, args.tp, args.pp, args.dp, args.tensor_split)
    return not args.deterministic and all(value is None for value in given)


def _fit_into_hosts(args: Namespace, world: World, model: Model, room: int, work: int) -> bool:
    """Return whether each of several hosts can easily hold a replica, with a whole KV cache."""
    grid = host_replicas(world.hosts)
    if grid.dp == 1:
        return False
    partition = Partition(model.cfg, model.tensors, grid, (1.0,) * grid.replica_size, args.ep)
    kv_types = (args.cache_type_k, args.cache_type_v)
    kv = [kv_bytes(model.cfg, *partition.of(rank), model.n_kv, *kv_types) for rank in range(grid.size)]
    return fits_easily(world, [partition.bytes_of(rank) + kv[rank] for rank in range(grid.size)], room, work)


def _device_memory(args: Namespace, model: Model, backend: Backend, n_ranks: int) -> tuple[int, int]:
    """Return the bytes that are free on this rank's device, 0 if it has none, and those that it works in."""
    if not isinstance(backend, GpuBackend):
        return 0, WORKSPACE
    n_slices, n_here = (VIRTUAL_RANKS, -(-VIRTUAL_RANKS // n_ranks)) if args.deterministic else (model.grid.tp, 1)
    n_tokens = min(args.batch_size, args.ubatch_size)
    return backend.free_memory(), backend.work_bytes(model.cfg, n_tokens, n_slices, n_here)


def _team(world: World, grid: Grid) -> Team:
    """Return the ranks of this rank's replica."""
    return world if grid.dp == 1 else world.part(grid.replica(grid.place(world.rank).replica))


def _deterministic_grid(args: Namespace, n_ranks: int) -> Grid:
    if args.split_mode == "layer" or (args.pp or 1) * (args.dp or 1) > 1:
        raise UsageError("--deterministic is for tensor parallelism alone; leave --pp, --dp and -sm layer out")
    return Grid(n_ranks)


def wants_graphs() -> bool:
    """Whether steps of decoding may be recorded (see `Runner`): unless ``MPILLAMA_GRAPHS=0``."""
    return os.environ.get("MPILLAMA_GRAPHS", "") != "0"


def stage_group(
    args: Namespace, team: Team, grid: Grid, backend: Backend, gpu: str = "", several: bool = False
) -> Group:
    """Return the group of this rank's stage, for arrays of its backend."""
    if grid.tp == team.size:
        # NCCL's own switch for ranks that share a GPU.
        if os.environ.get("NCCL_MULTI_RANK_GPU_ENABLE", "") == "1":
            gpu = ""
        try:
            return device_group(team, backend, Collectives(args.collectives, args.wire), gpu)
        except UserError as error:
            # The other replicas have not heard of it.
            error.told = error.told and (not several or isinstance(error, PeerFailure))
            raise
    if args.wire != "f32" or args.collectives == "mpi":
        raise UsageError("--wire and --collectives mpi are for ranks that are not in several stages: leave --pp out")
    return tensor_group(team.group(grid.stage_ranks(team.rank)), backend)


def open_runner(
    model: Model,
    partition: Partition,
    rank: int,
    ops: Ops,
    pipe: Pipe,
    kv_types: tuple[str, str],
    source: Source,
) -> tuple[Runner, int]:
    """Load the weights of a rank, or of a virtual one.

    Args:
        model: what is loaded.
        partition: of the model.
        rank: in the partition.
        ops: over the rank's backend and the group of its stage.
        pipe: to the stages next to it.
        kv_types: of keys and values.
        source: of the slices.

    Returns:
        The runner, and the bytes that were read.
    """
    sharding, index = partition.of(rank)
    weights = take_weights(source, model.tensors, sharding, index, ops.backend)
    n_head_kv = partition.n_head_kv(rank)
    sizes = (n_head_kv, model.n_kv, *kv_types)
    runner = Runner(model.cfg, weights, ops, *sizes, sharding.blocks, pipe, graphs=wants_graphs())
    return runner, source.bytes_read


def virtual_ranks(weights: tuple[float, ...]) -> list[range]:
    """Return the virtual ranks of each rank.

    Raises:
        UsageError: there are none for some rank.
    """
    counts = apportion(VIRTUAL_RANKS, weights)
    if 0 in counts:
        raise UsageError(
            f"--deterministic cuts the model into {VIRTUAL_RANKS} parts, and leaves none for rank {counts.index(0)}; "
            "start fewer ranks, or give it a larger share with -ts"
        )
    ends = [sum(counts[:i]) for i in range(len(counts) + 1)]
    return [range(a, b) for a, b in pairwise(ends)]


def open_backend(args: Namespace, world: World, one_thread: bool = False) -> tuple[Backend, int, str]:
    """Return this rank's backend, its number of threads, and what tells its GPU from others, "" if it has none.

    With ``one_thread`` it is one that has to share the rank.

    ``MPILLAMA_CPU_LEVEL`` names the instruction sets that the cpu backend may use.

    Raises:
        UsageError: the backend or the level is not there.
    """
    threads, cores = (1, ()) if one_thread else place_threads(world, args.threads)
    threadpool_limits(threads)
    # CuPy keeps compiled kernels in the home folder, which the nodes of a cluster share, and which is slow.
    os.environ.setdefault("CUPY_CACHE_DIR", str(user_cache() / "cupy"))
    name, device, gpu = choose_device(args, world)
    return make_backend(name, threads, cores, os.environ.get("MPILLAMA_CPU_LEVEL", ""), device), threads, gpu


def _another(backend: Backend) -> Backend:
    """Return one more of this kind for a virtual rank, with one thread, on the same device."""
    index = getattr(getattr(backend, "device", None), "index", 0)
    return make_backend(backend.name, 1, (), os.environ.get("MPILLAMA_CPU_LEVEL", ""), index)


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
