"""Facts of one rank: where it runs, on what, and within which limits. Nothing here judges."""

from __future__ import annotations

import os
import platform
import re
import resource
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

# Launchers by a variable that only they set; the first that is there counts. Several may be: mpirun inside of a batch
# job inherits the batch system's.
_LAUNCHERS = (
    ("OMPI_COMM_WORLD_RANK", "Open MPI's mpirun"),
    ("JSM_NAMESPACE_RANK", "jsrun"),
    ("PALS_RANKID", "PALS mpiexec"),
    ("FLUX_TASK_RANK", "flux run"),
    ("HYDI_CONTROL_FD", "MPICH's mpirun (hydra)"),
    ("MPI_LOCALRANKID", "mpirun (hydra)"),
    ("SLURM_STEP_ID", "srun"),
    ("PMI_RANK", "mpirun"),
)
_BATCH = (
    ("SLURM_JOB_ID", "Slurm"),
    ("PBS_JOBID", "PBS"),
    ("LSB_JOBID", "LSF"),
    ("FLUX_JOB_ID", "Flux"),
    ("COBALT_JOBID", "Cobalt"),
    ("JOB_ID", "Grid Engine"),
)
_ANCESTORS = ("mpiexec", "mpirun", "hydra", "prte", "orte", "slurmstepd", "srun", "jsrun", "flux-shell", "pmix")


@dataclass
class RankFacts:
    """One rank's.

    Attributes:
        launched_by: a launcher among the ancestors of the process, or "".
        cores: that it may run on, of ``n_cores`` that the host has.
        shm: bytes that /dev/shm has, and has free.
        memory: bytes that this process may still use.
        limits: soft limits of memlock, stack and nofile; -1: unlimited.
        gpus: of the host, by maker, as the driver names them; ``visible`` what the variables leave of them to this
            rank, None if they say nothing.
        driver: its version.
        nccl: version of the library that CuPy loads, "" if there is none, and ``cupy`` likewise.
        infiniband: adapters of the host.
    """

    host: str
    pid: int
    cores: tuple[int, ...]
    n_cores: int
    cpu: str
    shm: tuple[int, int]
    memory: int
    limits: dict[str, int]
    launched_by: str = ""
    gpus: list[str] = field(default_factory=list)
    maker: str = ""
    driver: str = ""
    visible: str | None = None
    cupy: str = ""
    nccl: str = ""
    infiniband: list[str] = field(default_factory=list)
    python: str = platform.python_version()


def rank_facts(environ: Mapping[str, str], available: int) -> RankFacts:
    """Collect what can be known without MPI; ``available`` is the memory that this process may still use."""
    shm = os.statvfs("/dev/shm") if os.path.isdir("/dev/shm") else None
    limits = {}
    for name in ("memlock", "stack", "nofile"):
        soft, _ = resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
        limits[name] = -1 if soft == resource.RLIM_INFINITY else soft
    facts = RankFacts(
        host=platform.node(),
        pid=os.getpid(),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        n_cores=os.cpu_count() or 1,
        cpu=processor() or platform.machine(),
        shm=(shm.f_blocks * shm.f_frsize, shm.f_bavail * shm.f_frsize) if shm else (0, 0),
        memory=available,
        limits=limits,
        launched_by=_ancestor(),
        infiniband=_names(Path("/sys/class/infiniband")),
    )
    _add_gpus(facts, environ)
    return facts


def launcher(environ: Mapping[str, str]) -> str:
    """Return the launcher that started this process, "" if none did."""
    return next((name for variable, name in _LAUNCHERS if environ.get(variable)), "")


def batch_system(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the batch system and the job's id, empty outside of a job."""
    return next(((name, environ[variable]) for variable, name in _BATCH if environ.get(variable)), ("", ""))


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []


# ARM's processors tell numbers (MIDR_EL1, as Linux shows it): of who made the core, and of the core.
_ARM_CORES = {
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd0c"): "Neoverse N1",
    ("0x41", "0xd40"): "Neoverse V1",
    ("0x41", "0xd49"): "Neoverse N2",
    ("0x41", "0xd4f"): "Neoverse V2",
    ("0x41", "0xd84"): "Neoverse V3",
    ("0x43", "0x0af"): "ThunderX2",
    ("0x46", "0x001"): "A64FX",
    ("0x48", "0xd01"): "Kunpeng 920",
    ("0xc0", "0xac3"): "AmpereOne",
    ("0xc0", "0xac4"): "AmpereOne A",
}


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the name of this host's processor, "" if the system does not tell."""
    try:
        fields = dict(re.findall(r"^([^\t\n:]+?)[ \t]*:[ \t]*(.+)$", cpuinfo.read_text(), re.MULTILINE))
    except OSError:
        return ""
    if "CPU part" not in fields:
        return fields.get("model name", "")
    maker, part = fields.get("CPU implementer", "?"), fields["CPU part"]
    return _ARM_CORES.get((maker, part), f"ARM processor {maker} {part}")


def _ancestor() -> str:
    """Return the nearest ancestor that is a launcher: known by its name also where its variables are not."""
    pid = os.getppid()
    try:
        while pid > 1:
            name = Path(f"/proc/{pid}/comm").read_text().strip()
            if name.startswith(_ANCESTORS):
                return name
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        # No /proc, or a process that has ended: nothing is known.
        return ""
    return ""


def _add_gpus(facts: RankFacts, environ: Mapping[str, str]) -> None:
    """Read what the drivers of NVIDIA and AMD tell in files, without loading any of their libraries."""
    nvidia = Path("/proc/driver/nvidia")
    for information in sorted(nvidia.glob("gpus/*/information")):
        match = re.search(r"Model:\s*(.+)", information.read_text())
        facts.gpus.append(match[1].strip() if match else "NVIDIA GPU")
    if not facts.gpus:
        # In containers the folder may be missing while the devices are there.
        facts.gpus = ["NVIDIA GPU" for device in Path("/dev").glob("nvidia[0-9]*") if device.name[6:].isdigit()]
    if facts.gpus:
        facts.maker = "NVIDIA"
        version = nvidia / "version"
        match = re.search(r"Module\s+(?:for \S+\s+)?([0-9.]+)", version.read_text()) if version.exists() else None
        facts.driver = match[1] if match else ""
        facts.visible = environ.get("CUDA_VISIBLE_DEVICES")
    else:
        for node in sorted(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/properties")):
            match = re.search(r"^simd_count (\d+)", node.read_text(), re.MULTILINE)
            if match and int(match[1]):
                facts.gpus.append("AMD GPU")
        if facts.gpus:
            facts.maker = "AMD"
            version = Path("/sys/module/amdgpu/version")
            facts.driver = version.read_text().strip() if version.exists() else ""
            names = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES")
            facts.visible = next((environ[name] for name in names if name in environ), None)
    if facts.gpus:
        facts.cupy, facts.nccl = _cupy()


def _cupy() -> tuple[str, str]:
    """Return the versions of CuPy and of NCCL or RCCL through it, empty where they cannot be imported."""
    try:
        import cupy
    except ImportError:
        return "", ""
    try:
        from cupy.cuda import nccl

        number = int(nccl.get_version())
    except (ImportError, AttributeError):
        return cupy.__version__, ""
    return cupy.__version__, f"{number // 10000}.{number // 100 % 100}.{number % 100}"
