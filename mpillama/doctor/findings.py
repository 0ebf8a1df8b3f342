"""From facts to findings: one line each, with the fix. Pure functions, so that any cluster's facts can be tried."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mpillama.cli.progress import format_bytes
from mpillama.doctor.facts import RankFacts
from mpillama.doctor.files import PARALLEL_FILES, SLOW_FILES

LEVELS = ("ok", "note", "warn", "broken")
_MB = 1 << 20
# Above these, something is not as it should be: microseconds of a short message, GB/s of a long one.
_SLOW_WITHIN_US, _SLOW_BETWEEN_US, _SLOW_BETWEEN_GBPS = 20.0, 40.0, 1.0
_SLOW_READ = 200e6


@dataclass(frozen=True)
class Finding:
    """One line; ``level`` is ``ok``, ``note`` (worth knowing), ``warn`` (slow or fragile) or ``broken``.

    ``hosts`` are those it is about; none: the whole job.
    """

    level: str
    topic: str
    text: str
    fix: str = ""
    hosts: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """For people."""
        where = f"{_some(self.hosts)}: " if self.hosts else ""
        return f"{self.level:6}  {self.topic:9}  {where}{self.text}" + (f"; fix: {self.fix}" if self.fix else "")


@dataclass
class Job:
    """Everything that is known of a job.

    Attributes:
        place: what the launcher says: rank, size and its name; ``world_size`` is what MPI says.
        stranded: why the ranks could not join, "" if they have.
        mpi: see `comm.probe.mpi_facts`.
        ranks: of each rank; only the own one if stranded.
        times: seconds of messages: (``within`` or ``between``, ``ping-pong`` or ``allreduce``, bytes) to seconds.
        model: ``path``, ``type`` and ``point`` of its file system, ``bytes``, and ``read`` in bytes per second; or
            ``error``.
    """

    launcher: str
    launched: int
    world_size: int
    stranded: str
    mpi: dict[str, Any]
    ranks: list[RankFacts]
    batch: tuple[str, str] = ("", "")
    batch_tasks: int = 0
    seconds_left: float | None = None
    times: dict[tuple[str, str, int], float] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    backend: str = ""


def findings(job: Job) -> list[Finding]:
    """Return all findings; what is the same on several hosts is one."""
    hosts: dict[Finding, tuple[str, ...]] = {}
    for part in (_cores, _gpus, _memory, _limits):
        for host, ranks in _hosts(job).items():
            for finding in part(job, ranks):
                hosts[finding] = (*hosts.get(finding, ()), host)
    several = len(_hosts(job)) > 1
    told = [replace(finding, hosts=where if several else ()) for finding, where in hosts.items()]
    before, after = (_ranks, _mpi), (_network, _files, _batch)
    return [*(f for part in before for f in part(job)), *told, *(f for part in after for f in part(job))]


def _hosts(job: Job) -> dict[str, list[RankFacts]]:
    hosts: dict[str, list[RankFacts]] = {}
    for facts in job.ranks:
        hosts.setdefault(facts.host, []).append(facts)
    return hosts


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _ranks(job: Job) -> Iterator[Finding]:
    if job.stranded:
        yield Finding("broken", "ranks", job.stranded)
        return
    if job.world_size == 1:
        started = job.launcher or (job.ranks[0].launched_by and f"a launcher ({job.ranks[0].launched_by})")
        if job.batch_tasks > 1:
            yield Finding(
                "warn",
                "ranks",
                f"one process, in a job of {job.batch_tasks} tasks",
                "start it with srun (or mpirun) in the job script",
            )
        elif started and not job.launcher:
            yield Finding(
                "warn",
                "ranks",
                f"one process, started by {started} without telling it a number of ranks",
                "if more than one was asked for, use the launcher that belongs to the MPI library",
            )
        else:
            yield Finding("ok", "ranks", "one process" + (f", started by {started}" if started else ", no launcher"))
        return
    hosts = _hosts(job)
    counts = Counter(len(ranks) for ranks in hosts.values())
    named = _some([f"{host} {len(ranks)}" for host, ranks in hosts.items()])
    yield Finding(
        "ok",
        "ranks",
        f"one job of {job.world_size} ranks on {len(hosts)} host{'s' * (len(hosts) > 1)} ({named}), started by "
        f"{job.launcher or 'an unknown launcher'}",
    )
    if len(counts) > 1:
        yield Finding(
            "note",
            "ranks",
            "hosts have different numbers of ranks",
            "same number on each (--ntasks-per-node, -ppn), or give slower ranks less with -ts",
        )
    versions = {facts.python for facts in job.ranks}
    if len(versions) > 1:
        yield Finding(
            "warn", "ranks", f"hosts run different Pythons ({_some(sorted(versions))})", "use one environment"
        )


def _mpi(job: Job) -> Iterator[Finding]:
    mpi = job.mpi
    if "error" in mpi:
        level = "broken" if job.launched > 1 else "note"
        yield Finding(
            level,
            "MPI",
            f"no MPI library can be loaded ({mpi['error']})",
            "load the cluster's MPI module (MPI4PY_LIBMPI names a library), or pip install 'mpillama[mpich]'",
        )
        return
    memory = mpi.get("memory", "")
    aware = next((kind for kind in ("cuda", "rocm", "level_zero") if kind in memory), "")
    gpu = f"GPU-aware ({aware})" if aware else "not GPU-aware" if memory else "GPU-awareness unknown"
    yield Finding(
        "ok",
        "MPI",
        f"{mpi['name']} {mpi['version']} (MPI {mpi['standard']}, mpi4py {mpi['mpi4py']}, threads {mpi['threads']}), "
        f"{gpu}",
    )


def _cores(job: Job, ranks: list[RankFacts]) -> Iterator[Finding]:
    sets = [set(facts.cores) for facts in ranks]
    union = set().union(*sets)
    n = ranks[0].n_cores
    text = f"{len(ranks)} rank{'s' * (len(ranks) > 1)} on {len(union)} of {n} cores"
    more = "--cpus-per-task (srun), --bind-to none (Open MPI's mpirun)"
    if len(ranks) > len(union):
        fix = "fewer ranks on each host, or more cores for the job"
        yield Finding("warn", "cores", f"{text}: more ranks than cores", fix)
    elif all(other == sets[0] for other in sets):
        if len(union) == 1 < n:
            yield Finding("warn", "cores", f"{text}: bound to a single core", more)
        else:
            yield Finding("ok", "cores", text + (", each may use all of them" if len(ranks) > 1 else ""))
    elif sum(map(len, sets)) > len(union):
        fix = "--cpu-bind=cores with --cpus-per-task (srun), --bind-to none (mpirun)"
        yield Finding("warn", "cores", f"{text}, bound so that some share cores and others do not", fix)
    else:
        each = sorted({len(own) for own in sets})
        text += f", bound to {each[0] if len(each) == 1 else f'{each[0]} to {each[-1]}'} each, no overlap"
        if each[0] == 1 and len(union) < n:
            yield Finding("warn", "cores", text, f"{more} use the others too")
        else:
            yield Finding("ok", "cores", text)


def _gpus(job: Job, ranks: list[RankFacts]) -> Iterator[Finding]:
    facts = ranks[0]
    if not facts.gpus:
        if any(other.gpus for other in job.ranks):
            yield Finding("warn", "GPUs", "none, though other hosts have some", "ask for hosts that are alike")
        else:
            yield Finding("note", "GPUs", "none")
        return
    names = ", ".join(f"{n} x {name}" for name, n in Counter(facts.gpus).items())
    text = f"{names}, driver {facts.driver or 'of unknown version'}"
    hidden = [other for other in ranks if other.visible is not None and not other.visible.strip()]
    if hidden:
        fix = "ask the batch system for them: --gpus-per-node"
        yield Finding("warn", "GPUs", f"{text}; {len(hidden)} ranks may use none", fix)
    else:
        yield Finding("ok", "GPUs", text)
    if len(ranks) > len(facts.gpus):
        yield Finding("warn", "GPUs", f"{len(ranks)} ranks share {len(facts.gpus)} GPUs", "one rank for each GPU")
    library = "NCCL" if facts.maker == "NVIDIA" else "RCCL"
    if not facts.cupy:
        yield Finding("note", "GPUs", "CuPy cannot be imported, so GPUs stay unused", "pip install cupy")
    elif not facts.nccl:
        fix = "pip install the nvidia-nccl package of CuPy's CUDA version, or load the module"
        yield Finding("warn", "GPUs", f"CuPy {facts.cupy} finds no {library}", fix)
    else:
        yield Finding("ok", "GPUs", f"CuPy {facts.cupy}, {library} {facts.nccl}")


def _memory(job: Job, ranks: list[RankFacts]) -> Iterator[Finding]:
    free = min(facts.memory for facts in ranks)
    share = int(job.model.get("bytes", 0) * len(ranks) / max(1, len(job.ranks)))
    # In whole units, so that hosts that are alike are told together.
    text = f"{free >> 30} GiB may be used" if free >> 30 else f"{format_bytes(free)} may be used"
    if share > free:
        fix = "more hosts, more memory for the job (--mem), or a type with fewer bits"
        yield Finding("broken", "memory", f"{text}, but the share of the model is {format_bytes(share)}", fix)
    else:
        yield Finding("ok", "memory", text)
    total, left = ranks[0].shm
    if len(ranks) > 1 and left < 64 * _MB:
        yield Finding(
            "warn",
            "memory",
            f"/dev/shm, where MPI and NCCL pass messages, has {format_bytes(left)} free of {format_bytes(total)}",
            "remove leftovers of dead jobs, or give the container more (--shm-size 1g)",
        )


def _limits(job: Job, ranks: list[RankFacts]) -> Iterator[Finding]:
    limits = ranks[0].limits
    if ranks[0].infiniband and 0 <= limits["memlock"] < 64 * _MB:
        fix = "ulimit -l unlimited (Slurm: PropagateResourceLimitsExcept=MEMLOCK)"
        yield Finding("warn", "limits", f"memlock {format_bytes(limits['memlock'])}, too little for InfiniBand", fix)
    if 0 <= limits["nofile"] < 1024:
        yield Finding("warn", "limits", f"{limits['nofile']} open files", "ulimit -n 4096")
    shown = ", ".join(
        f"{name} {'unlimited' if n < 0 else n if name == 'nofile' else format_bytes(n)}" for name, n in limits.items()
    )
    yield Finding("ok", "limits", shown)


def _network(job: Job) -> Iterator[Finding]:
    for where in ("within", "between"):
        short, long = job.times.get((where, "ping-pong", 8)), job.times.get((where, "ping-pong", 4 * _MB))
        if short is None or long is None:
            continue
        us, gbps = 1e6 * short, 4 * _MB / long / 1e9
        text = f"{where} hosts" if where == "between" else "within a host"
        text = f"{text}: {us:.1f} us, {gbps:.2f} GB/s"
        sums = {n: t for (place, kind, n), t in job.times.items() if (place, kind) == (where, "allreduce")}
        if sums:
            text += ", allreduce " + ", ".join(f"{format_bytes(n)} {1e6 * t:.1f} us" for n, t in sorted(sums.items()))
        if where == "within" and us > _SLOW_WITHIN_US:
            fix = "look at the cores above; no more ranks than cores"
            yield Finding("warn", "network", f"{text}: slow for shared memory", fix)
        elif where == "between" and (us > _SLOW_BETWEEN_US or gbps < _SLOW_BETWEEN_GBPS):
            adapters = job.ranks[0].infiniband
            fix = (
                f"{_some(adapters)} is there: use the cluster's own MPI module, built for it"
                if adapters
                else "keep tensor parallelism within hosts (--tp), stages between them (--pp)"
            )
            yield Finding("warn", "network", f"{text}: not a fast network", fix)
        else:
            yield Finding("ok", "network", text)


def _files(job: Job) -> Iterator[Finding]:
    model = job.model
    if not model:
        return
    if "error" in model:
        yield Finding("broken", "model", model["error"])
        return
    kind, speed = model["type"], model["read"]
    text = f"{model['path']}: {format_bytes(model['bytes'])} on {kind or 'an unknown file system'} ({model['point']})"
    text += f", all ranks read {speed / 1e6:,.0f} MB/s, so loading takes about {model['bytes'] / max(speed, 1):.0f} s"
    if kind in SLOW_FILES or speed < _SLOW_READ:
        yield Finding("warn", "model", text, "copy it to the parallel file system or to the nodes' own disks first")
    else:
        yield Finding("ok", "model", text + (" (parallel file system)" if kind in PARALLEL_FILES else ""))


def _batch(job: Job) -> Iterator[Finding]:
    name, number = job.batch
    if not name:
        return
    left = job.seconds_left
    text = f"{name} job {number}"
    if left is None:
        yield Finding("ok", "batch", text)
    elif left < 300:
        yield Finding("warn", "batch", f"{text} ends in {left:.0f} s", "ask for more time (--time)")
    else:
        yield Finding("ok", "batch", f"{text}, {left / 60:.0f} minutes left")
