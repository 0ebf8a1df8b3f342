"""`mpillama bench`: tokens per second of a model or a shape, in the manner of llama-bench, on any number of ranks."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median

from mpillama import __version__
from mpillama.backends import GPU_NAMES
from mpillama.backends.base import Backend
from mpillama.backends.gpu.backend import GpuBackend
from mpillama.bench.measure import Figures, MeteredRunner, RankSteps, Workload, figures, spread
from mpillama.bench.model import BenchModel, StepBytes, describe, load, step_bytes
from mpillama.bench.output import COMPARISON, DETAILS, Printer, Result, make_printer
from mpillama.bench.peer import NAME, Peer, import_peer
from mpillama.bench.plan import Case, Load, cases, workloads
from mpillama.bench.plot import Row, import_matplotlib, plot, read_results
from mpillama.bench.shapes import shape_header
from mpillama.bench.stream import stream_gbps
from mpillama.bench.weights import write_random_gguf
from mpillama.cli.bench_options import loads, with_defaults
from mpillama.cli.devices import Kinds, kinds_of
from mpillama.cli.loading import read_watch
from mpillama.cli.memory import check_memory
from mpillama.cli.progress import LoadProgress, Log
from mpillama.cli.session import grid_of, model_path, open_backend, stage_group, wants_graphs
from mpillama.cli.shares import choose_shares
from mpillama.comm.base import Group, World, from_root
from mpillama.comm.metered import MeteredGroup
from mpillama.comm.pipeline import open_pipe
from mpillama.comm.staged import tensor_group
from mpillama.doctor.facts import processor
from mpillama.errors import UsageError
from mpillama.grid import Grid
from mpillama.models.weights import Weights
from mpillama.ops import Ops
from mpillama.partition import Partition
from mpillama.runner import kv_bytes
from mpillama.spmd import Interrupts
from mpillama.steps import Leader, follow

# Settings that have a column of their own only if they are given.
_SETTINGS = {
    "batch_size": "n_batch",
    "ubatch_size": "n_ubatch",
    "cache_type_k": "type_k",
    "cache_type_v": "type_v",
    "tensor_split": "tensor_split",
}


class _Interrupted(Exception):
    """A signal has ended a run between two steps, on all ranks."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


@dataclass
class _Loaded:
    """A model on this rank; ``stream`` is what all ranks together read from memory in GB/s, on rank 0."""

    spec: Load
    model: BenchModel
    partition: Partition
    backend: Backend
    kinds: Kinds
    weights: Weights
    reads: StepBytes
    n_threads: int
    stream: float | None


@dataclass
class _Cache:
    """A runner with a KV cache of some types, and how many tokens of a context it holds for how many sequences."""

    types: tuple[str, str]
    runner: MeteredRunner
    n_filled: int = 0
    n_parallel: int = 1


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    with ExitStack() as stack:
        try:
            _Bench(args, world, interrupts, stack).run()
        except _Interrupted as interrupted:
            return interrupted.exit_code
    return 0


class _Bench:
    """All ranks go through the same cases in the same order; rank 0 leads each run of steps, prints and compares."""

    def __init__(self, args: Namespace, world: World, interrupts: Interrupts, stack: ExitStack) -> None:
        self._given, self._args = args, with_defaults(args)
        self._world, self._interrupts, self._stack = world, interrupts, stack
        self._log = Log(args, world.rank)
        # Before a backend pins this thread.
        self._cores = os.sched_getaffinity(0)
        self._groups: dict[Grid, Group] = {}
        self._loaded: _Loaded | None = None
        self._cache: _Cache | None = None
        self._peer: Peer | None = None
        self._formats = [args.output, args.output_err or "none"]
        self._details = args.verbose or args.plot is not None or bool({*self._formats} - {"md", "none"})

    def run(self) -> None:
        """Run all cases."""
        args = self._args
        earlier = from_root(self._world, self._prepare)
        planned = cases(
            loads(args),
            args.batch_size,
            args.ubatch_size,
            args.cache_type_k,
            args.cache_type_v,
            workloads(args.n_prompt, args.n_gen, args.pg, args.n_depth, args.n_parallel),
        )
        n_ctx = max(case.test.n_ctx for case in planned)
        printers = self._printers()
        for printer in printers:
            printer.header()
        results: list[Row] = []
        for i, case in enumerate(planned):
            self._say(f"test {i + 1}/{len(planned)} {case.test.name}: {case.load.model or 'model'}")
            loaded = self._load(case.load, n_ctx)
            result = self._measure(case, loaded)
            if result is None:
                continue
            results.append(asdict(result))
            for printer in printers:
                printer.row(result)
        for printer in printers:
            printer.footer()
        if args.plot:
            from_root(self._world, lambda: plot([*earlier, *results], args.plot))

    def _prepare(self) -> list[Row]:
        """Rank 0: find out what is missing before anything is measured; returns the results of earlier runs."""
        args = self._args
        if args.plot:
            import_matplotlib()
            if not args.plot.parent.is_dir():
                raise UsageError(f"--plot {args.plot}: the folder {args.plot.parent} does not exist")
        if args.compare:
            import_peer()
            if len(set(self._world.hosts)) > 1:
                raise UsageError(f"--compare {NAME} runs on one host, but the ranks are on several; start all on one")
        return [row for file in args.plot_add for row in read_results(file)]

    def _printers(self) -> list[Printer]:
        if self._world.rank != 0:
            return []
        args = self._args
        also = [field for dest, field in _SETTINGS.items() if getattr(self._given, dest)]
        also += DETAILS if args.verbose else ()
        also += COMPARISON if args.compare else ()
        peer = f"{NAME} t/s"
        streams = zip(self._formats, (sys.stdout, sys.stderr), strict=True)
        return [make_printer(format, stream, also, peer) for format, stream in streams if format != "none"]

    def _say(self, text: str) -> None:
        if self._args.progress and self._world.rank == 0:
            print(f"mpillama bench: {text}", file=sys.stderr, flush=True)

    # -- models ----------------------------------------------------------------------------------------------------

    def _load(self, spec: Load, n_ctx: int) -> _Loaded:
        """Return the model, loaded unless it is there already."""
        if self._loaded is not None and self._loaded.spec == spec:
            return self._loaded
        # What is replaced goes first: there may be no room for two models.
        self._loaded, self._cache = None, None
        self._close_peer()
        self._interrupts.deferred = False
        world = self._world
        backend, n_threads, gpu = open_backend(Namespace(**{**vars(self._args), "threads": spec.n_threads}), world)
        model = from_root(world, lambda: self._describe(spec, n_ctx, backend))
        if isinstance(spec.tensor_split, str):
            found = choose_shares(spec.tensor_split, world, model.grid, backend)
            # To be read in a table: 1.94/1.
            model = replace(model, shares=tuple(share / min(found) for share in found))
        partition = Partition(model.cfg, model.tensors, model.grid, model.shares, self._args.ep)
        self._check_memory(model, partition, backend)
        stream = self._stream(backend, n_threads) if self._details else None
        weights = self._weights(model, partition, backend)
        reads = step_bytes(model, *partition.stages)
        kinds = kinds_of(world, backend, gpu)
        self._loaded = _Loaded(spec, model, partition, backend, kinds, weights, reads, n_threads, stream)
        if self._args.compare:
            self._peer = self._open_peer(self._loaded)
        return self._loaded

    def _describe(self, spec: Load, n_ctx: int, backend: Backend) -> BenchModel:
        path: str | None = None
        if not spec.random:
            hub = None if spec.model else self._args.hf_repo
            args = Namespace(**{**vars(self._args), "model": spec.model or None, "hf_repo": hub})
            path = os.fspath(model_path(args))
        split = () if isinstance(spec.tensor_split, str) else spec.tensor_split
        model = describe(path or spec.model, path, split, self._world.size, n_ctx, backend)
        model = replace(model, grid=grid_of(self._args, self._world.hosts, model.cfg.n_layer))
        model.grid.stage_weights(model.shares)
        return model

    def _check_memory(self, model: BenchModel, partition: Partition, backend: Backend) -> None:
        """Make sure that the ranks find room on their hosts or GPUs, rather than let the system kill them."""
        world, args = self._world, self._args
        need = partition.bytes_of(world.rank)
        need += max(
            kv_bytes(model.cfg, *partition.of(world.rank), model.n_ctx, type_k, type_v)
            for type_k in args.cache_type_k
            for type_v in args.cache_type_v
        )
        own = backend.free_memory() if isinstance(backend, GpuBackend) else 0
        check_memory(world, need, model.type_name, own)

    def _stream(self, backend: Backend, n_threads: int) -> float:
        """Measure what the ranks read from memory, all at once; returns the sum on rank 0."""
        self._say("streaming reads")
        world = self._world
        world.bcast(None)
        return float(sum(world.gather(stream_gbps(backend, n_threads, world.local_size))))

    def _weights(self, model: BenchModel, partition: Partition, backend: Backend) -> Weights:
        self._say(f"loading {model.type_name}")
        world = self._world
        total = sum(partition.bytes_of(rank) for rank in range(world.size))
        with LoadProgress(total, enabled=self._log.interactive) as bar, read_watch(world) as watch:

            def progress(n: int) -> None:
                world.report(n)
                bar.update(n + (world.reported() if world.rank == 0 else 0))

            weights = load(model, *partition.of(world.rank), backend, progress, watch)
            world.bcast(world.gather(None))
            if world.rank == 0:
                bar.update(world.reported())
        return weights

    def _runner(self, case: Case, loaded: _Loaded) -> _Cache:
        types = (case.type_k, case.type_v)
        if self._cache is None or self._cache.types != types:
            self._cache = None
            model, world, grid = loaded.model, self._world, loaded.model.grid
            group = MeteredGroup(self._group(grid, loaded))
            ops = Ops(loaded.backend, group, loaded.kinds.alike(grid.stage_ranks(world.rank)))
            settings = (model.cfg, loaded.weights, ops, loaded.partition.n_head_kv(world.rank))
            stage = (loaded.partition.of(world.rank)[0].blocks, open_pipe(world, grid), wants_graphs())
            self._cache = _Cache(types, MeteredRunner(*settings, model.n_ctx, *types, *stage, group=group))
        return self._cache

    def _group(self, grid: Grid, loaded: _Loaded) -> Group:
        """Return the group of this rank's stage, for arrays of its backend; groups of GPUs belong to one backend."""
        if set(loaded.kinds.names) & set(GPU_NAMES):
            return stage_group(self._args, self._world, grid, loaded.backend, loaded.kinds.gpu)
        group = self._groups.get(grid) or self._world.group(grid.stage_ranks(self._world.rank))
        return tensor_group(self._groups.setdefault(grid, group), loaded.backend)

    # -- the program that is compared with ---------------------------------------------------------------------------

    def _open_peer(self, loaded: _Loaded) -> Peer | None:
        """Let rank 0 load the model there too, for the threads and cores of all ranks."""
        everyone = self._world.gather((loaded.n_threads, self._cores))
        found: list[Peer] = []
        from_root(self._world, lambda: found.append(self._make_peer(loaded, everyone)))
        return found[0] if found else None

    def _make_peer(self, loaded: _Loaded, everyone: Sequence[tuple[int, set[int]]]) -> Peer:
        """Return the model in the other program; a shape goes there as a temporary file."""
        path = loaded.model.paths[0] if loaded.model.paths else ""
        if not path:
            folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="mpillama-bench-"))
            path = os.path.join(folder, "shape.gguf")
            self._say(f"writing {path}")
            write_random_gguf(Path(path), shape_header(loaded.spec.model))
        n_threads = sum(n for n, _ in everyone)
        peer = Peer(path, n_threads, frozenset().union(*(cores for _, cores in everyone)))
        self._stack.callback(peer.close)
        return peer

    def _close_peer(self) -> None:
        """Free the other program's model, and remove the file of a shape."""
        self._peer = None
        self._stack.close()

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _steps(self, runner: MeteredRunner, body: Callable[[Workload], None]) -> tuple[int, list[RankSteps]]:
        """Let rank 0 lead a run of steps; returns its nanoseconds there, and what each rank did in them."""
        world, loaded = self._world, self._loaded
        assert loaded is not None
        passed = 0
        if world.rank == 0:
            leader = Leader(world, runner)
            stopped = lambda: bool(self._interrupts.exit_code)  # noqa: E731
            workload = Workload(leader.run, runner.n_blocks, loaded.model.cfg.n_vocab, stopped)
            began = time.perf_counter_ns()
            body(workload)
            passed = time.perf_counter_ns() - began
            code = self._interrupts.exit_code
            leader.stop(code)
        else:
            code = follow(world, runner)
        if code:
            raise _Interrupted(code)
        return passed, world.gather(runner.take())

    def _measure(self, case: Case, loaded: _Loaded) -> Result | None:
        """Run a case on all ranks; only rank 0 gets a result."""
        args, test = self._args, case.test
        sizes = (case.n_batch, min(case.n_batch, case.n_ubatch))
        cache = self._runner(case, loaded)
        peer = self._peer
        if peer:
            peer.prepare(loaded.model.n_ctx, *sizes, case.type_k, case.type_v, test.n_parallel)
        self._interrupts.deferred = True
        time.sleep(args.delay)
        test_time = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")

        start = cache.n_filled if test.n_parallel == cache.n_parallel else 0
        if test.n_depth > start:
            self._say(f"{test.name}: filling the context to {test.n_depth}")
            self._steps(cache.runner, lambda work: work.prompt(start, test.n_depth - start, *sizes, test.n_parallel))
        # What comes after is overwritten.
        cache.n_filled, cache.n_parallel = test.n_depth, test.n_parallel
        if not args.no_warmup:
            self._say(f"{test.name}: warm-up")
            short = replace(test, n_gen=min(1, test.n_gen))
            self._steps(cache.runner, lambda work: work.test(short, *sizes))
            if peer:
                peer.test(test, case.n_batch, warmup=True)
        samples, repetitions, peer_samples = [], [], []
        for i in range(args.repetitions):
            self._say(f"{test.name}: repetition {i + 1}/{args.repetitions}")
            passed, steps = self._steps(cache.runner, lambda work: work.test(test, *sizes))
            samples.append(passed)
            repetitions.append(steps)
            if peer:
                peer_samples.append(peer.test(test, case.n_batch))
        if self._world.rank != 0:
            return None
        found = figures(test.n_tokens, samples, repetitions, loaded.reads)
        return self._result(case, loaded, test_time, found, peer_samples)

    def _result(
        self, case: Case, loaded: _Loaded, test_time: str, found: Figures, peer_samples: Sequence[int]
    ) -> Result:
        model, test, world = loaded.model, case.test, self._world
        peer_ts = [1e9 * test.n_tokens / ns for ns in peer_samples]
        ratios = [ours / theirs for ours, theirs in zip(found.samples_ts, peer_ts, strict=False)]
        return Result(
            build_commit=f"mpillama {__version__}",
            cpu_info=processor(),
            gpu_info="",
            backends=",".join(dict.fromkeys(loaded.kinds.names)),
            model_filename=model.filename,
            model_type=model.type_name,
            model_size=model.size,
            model_n_params=model.n_params,
            n_batch=case.n_batch,
            n_ubatch=case.n_ubatch,
            n_threads=loaded.n_threads,
            type_k=case.type_k,
            type_v=case.type_v,
            split_mode=_split_mode(model.grid),
            tensor_split="/".join(f"{share:.3g}" for share in model.shares),
            n_prompt=test.n_prompt,
            n_gen=test.n_gen,
            n_depth=test.n_depth,
            n_parallel=test.n_parallel,
            test_time=test_time,
            avg_ns=found.avg_ns,
            stddev_ns=found.stddev_ns,
            avg_ts=found.avg_ts,
            stddev_ts=found.stddev_ts,
            test=test.name,
            n_ranks=world.size,
            n_hosts=len(set(world.hosts)),
            comm_us=found.comm_us,
            comm_min_us=found.comm_min_us,
            comm_bytes=found.comm_bytes,
            comm_calls=found.comm_calls,
            host_us=found.host_us,
            skew_us=found.skew_us,
            overhead_us=found.overhead_us,
            weight_bytes=found.weight_bytes,
            kv_bytes=found.kv_bytes,
            read_gbps=found.read_gbps,
            stream_gbps=loaded.stream,
            stream_share=found.read_gbps / loaded.stream if loaded.stream else None,
            peer=f"{NAME} ({self._peer.version})" if self._peer else None,
            peer_avg_ts=fmean(peer_ts) if peer_ts else None,
            peer_stddev_ts=spread(peer_ts) if peer_ts else None,
            peer_ratio=median(ratios) if ratios else None,
            samples_ns=found.samples_ns,
            samples_ts=found.samples_ts,
            peer_samples_ts=tuple(peer_ts),
        )


def _split_mode(grid: Grid) -> str:
    if grid.pp == 1:
        return "tensor"
    return "layer" if grid.tp == 1 else f"{grid.tp} x {grid.pp}"
