"""`mpillama doctor`: what is right and wrong with this job; exits with 1 if something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mpillama import __version__
from mpillama.batch.clock import slurm_seconds_left
from mpillama.bench.weights import RANDOM_TYPES
from mpillama.cli.memory import available_memory
from mpillama.cli.session import open_backend
from mpillama.comm.base import World, from_root
from mpillama.comm.solo import StrandedWorld
from mpillama.doctor.facts import batch_system, launcher, rank_facts
from mpillama.doctor.files import file_system, read_speed
from mpillama.doctor.findings import Finding, Job, findings
from mpillama.errors import UsageError, UserError
from mpillama.gguf.reader import read_header
from mpillama.plan.cluster import GIB, as_toml, make_cluster
from mpillama.plan.measure import fit_link, measure_device, measure_within
from mpillama.spmd import Interrupts, launch

_SMALL, _LARGE = 8, 1 << 20
_SIZES = (_SMALL, 16 << 10, _LARGE)
_LONG = 4 << 20
_TYPES = ("Q4_K", "Q6_K", "Q8_0")


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    environ = os.environ
    place = launch(environ)
    stranded = world.reason if isinstance(world, StrandedWorld) else ""
    alone = world.size == 1
    mpi = _mpi_facts_apart() if alone else _mpi_facts()
    ranks = world.gather(rank_facts(environ, available_memory()))
    times = {} if alone or (args.quick and not args.save) else _times(world)
    model = _model(args.model, world) if args.model else {}
    tables = _measure(args, world, times) if args.save and not stranded else {}
    if world.rank != 0:
        return int(world.bcast(None))
    tasks = environ.get("SLURM_NTASKS", "")
    job = Job(
        launcher(environ),
        place.size,
        world.size,
        stranded,
        mpi,
        ranks,
        batch_system(environ),
        int(tasks) if tasks.isdigit() else 0,
        slurm_seconds_left(environ),
        times,
        model,
    )
    found = findings(job)
    if args.json:
        print(json.dumps(_as_json(job, found), indent=1))
    else:
        print("\n".join([f"mpillama {__version__}, Python {job.ranks[0].python}", *(f.line for f in found)]))
    sys.stdout.flush()
    code = int(any(finding.level == "broken" for finding in found))
    try:
        if tables:
            _save(args.save, tables)
    finally:
        world.bcast(code)
    return code


def _as_json(job: Job, found: list[Finding]) -> dict[str, Any]:
    facts = asdict(job)
    facts["times"] = [
        {"where": where, "what": what, "bytes": n, "seconds": seconds}
        for (where, what, n), seconds in job.times.items()
    ]
    return {
        "mpillama": __version__,
        "broken": any(finding.level == "broken" for finding in found),
        "findings": [asdict(finding) for finding in found],
        **facts,
    }


def _mpi_facts() -> dict[str, Any]:
    from mpillama.comm.probe import mpi_facts

    return mpi_facts()


def _mpi_facts_apart() -> dict[str, Any]:
    """Ask in a process of its own: a library of another launcher may end the one that loads it."""
    # Without the launcher's variables, or that process would take this one's place in the job.
    mine = {key: value for key, value in os.environ.items() if not key.startswith(("PMI", "PMIX", "OMPI_", "PRTE_"))}
    command = [sys.executable, "-m", "mpillama.comm.probe"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=30, env=mine, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"error": "loading it takes more than 30 s"}
    if told.returncode:
        lines = told.stderr.strip().splitlines() or [f"exit code {told.returncode}"]
        return {"error": f"the process that loads it ends with {told.returncode}: {lines[-1]}"}
    return dict(json.loads(told.stdout.strip().splitlines()[-1]))


def _times(world: World) -> dict[tuple[str, str, int], float]:
    """Time messages within the first host and from it to the next, and allreduces over a host and over all."""
    from mpillama.comm.probe import Network

    network, times = Network(), {}
    here = [rank for rank in range(world.size) if world.hosts[rank] == world.hosts[0]]
    away = [rank for rank in range(world.size) if world.hosts[rank] != world.hosts[0]]
    for where, others in (("within", here[1:]), ("between", away)):
        if not others:
            continue
        for n in (_SMALL, _LONG):
            times[where, "ping-pong", n] = network.ping_pong(0, others[0], n)
        for n in _SIZES:
            times[where, "allreduce", n] = network.allreduce(n, hosts=where == "between")
    network.close()
    return times


def _model(path: Path, world: World) -> dict[str, Any]:
    """Look at the model's file on rank 0, then read parts of it on all."""

    def look() -> dict[str, Any]:
        try:
            header = read_header(path)
        except UserError as error:
            return {"error": error.line}
        kind, point = file_system(path)
        n_bytes = sum(os.path.getsize(part) for part in header.paths)
        return {"path": str(path), "paths": header.paths, "type": kind, "point": point, "bytes": n_bytes}

    found: dict[str, Any] = from_root(world, look)
    if "error" in found:
        return found
    try:
        n_bytes, seconds = read_speed(found["paths"], world.rank, world.size)
        problem = ""
    except OSError as error:
        n_bytes, seconds, problem = 0, 1.0, f"{world.hosts[world.rank]} cannot read {path}: {error.strerror}"
    everyone = world.gather((n_bytes, seconds, problem))
    problems = [text for _, _, text in everyone if text]
    if problems:
        return {"error": problems[0]}
    slowest = max((seconds for _, seconds, _ in everyone), default=1.0)
    return {**found, "read": sum(n for n, _, _ in everyone) / max(slowest, 1e-9)}


def _measure(args: Namespace, world: World, times: dict[tuple[str, str, int], float]) -> dict[str, Any]:
    """Measure all that a cluster file holds; the result counts on rank 0."""
    known = {type.name: type for type in RANDOM_TYPES}
    types = args.types or _TYPES

    def check() -> None:
        unknown = next((name for name in types if name not in known), None)
        if unknown:
            raise UsageError(f"--types: {unknown!r} cannot be measured; there are {', '.join(sorted(known))}")
        if not args.save.absolute().parent.is_dir():
            raise UsageError(f"--save {args.save}: the folder {args.save.parent} does not exist")

    from_root(world, check)
    backend, n_threads = open_backend(args, world)
    device = measure_device(world, backend, n_threads, [known[name] for name in types])
    device["memory_gb"] = min(world.gather(available_memory()), default=GIB) / world.local_size / GIB
    tables: dict[str, Any] = {
        "hosts": len(set(world.hosts)),
        "ranks_per_host": world.local_size,
        "device": device,
    }
    small = 0.0
    if ("within", "allreduce", _LARGE) in times:
        # Ranks of a host have a better way than MPI's, above all where they outnumber the cores.
        small, large = measure_within(world, _LARGE)
        tables["within"] = {"name": "shm", **fit_link(world.local_size, small, large, _LARGE)}
    short, long = times.get(("between", "ping-pong", _SMALL)), times.get(("between", "ping-pong", _LONG))
    if short is not None and long is not None:
        tables["between"] = {"name": "hdr", "latency_us": short * 1e6, "gbps": _LONG / long / 1e9}
    if "collective_us" in device:
        # What the small model's collectives took holds the links' own latency too.
        wire = max(small, times.get(("between", "allreduce", _SMALL), 0.0))
        device["collective_us"] = max(0.0, device["collective_us"] - wire * 1e6)
    return tables


def _save(path: Path, tables: dict[str, Any]) -> None:
    try:
        path.write_text(as_toml(make_cluster(tables, "the measurement")), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--save {path}: {error.strerror}") from None
