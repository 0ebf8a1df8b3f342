"""Findings about jobs of other machines, and what is read from files."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from mpillama.batch.clock import slurm_seconds_left
from mpillama.doctor.facts import RankFacts, batch_system, launcher, processor
from mpillama.doctor.files import file_system, read_speed
from mpillama.doctor.findings import Finding, Job, findings

MPICH = {"name": "MPICH", "version": "4.2", "standard": "4.1", "mpi4py": "4.1", "threads": "multiple", "memory": "mpi"}
GIB = 1 << 30
LIMITS = {"memlock": -1, "stack": 8 << 20, "nofile": 4096}


def rank(host="n1", cores=range(8), **other):
    facts = {"pid": 1, "n_cores": 16, "cpu": "", "shm": (GIB, GIB), "memory": 8 * GIB, "limits": LIMITS}
    return RankFacts(host=host, cores=tuple(cores), **{**facts, **other})


def job(ranks, **other):
    facts = {"launcher": "srun", "launched": len(ranks), "world_size": len(ranks), "stranded": "", "mpi": MPICH}
    return Job(ranks=ranks, **{**facts, **other})


def told(made: Job, level: str) -> list[Finding]:
    found = findings(made)
    for finding in found:
        assert "\n" not in finding.line
        assert finding.level in ("ok", "note") or finding.fix or finding.level == "broken"
    return [finding for finding in found if finding.level == level]


def text(found: list[Finding]) -> str:
    return "\n".join(finding.line for finding in found)


def test_a_sound_job():
    ranks = [rank(host, range(4 * i, 4 * i + 4)) for host in ("n1", "n2") for i in range(4)]
    made = job(ranks, times={("between", "ping-pong", 8): 2e-6, ("between", "ping-pong", 4 << 20): 2e-4})
    assert told(made, "warn") == told(made, "broken") == []
    assert "one job of 8 ranks on 2 hosts (n1 4, n2 4), started by srun" in text(told(made, "ok"))
    assert "bound to 4 each, no overlap" in text(told(made, "ok"))
    assert "between hosts: 2.0 us, 20.97 GB/s" in text(told(made, "ok"))


def test_hosts_that_are_alike_are_told_together():
    ranks = [rank(f"n{i}", range(2), memory=8 * GIB + i) for i in range(300)]
    ranks += [rank("odd", range(1), memory=3 * GIB)]
    found = findings(job(ranks))
    assert len(found) < 12
    assert "n0, n1, n2, n3 and 296 more: 1 rank on 2 of 16 cores" in text(found)
    assert "odd: 3 GiB may be used" in text(found)


def test_jobs_of_one_rank_each():
    (found,) = told(job([rank()], launched=4, world_size=1, stranded="srun started 4 processes, but ..."), "broken")
    assert (found.topic, found.text[:24]) == ("ranks", "srun started 4 processes")


def test_no_mpi_library_matters_only_to_several():
    without = {"mpi": {"error": "cannot load MPI library"}}
    assert told(job([rank()], launcher="", **without), "broken") == []
    assert "pip install" in told(job([rank()], launched=2, **without), "broken")[0].fix


@pytest.mark.parametrize(
    ("cores", "words"),
    [
        ([range(2), range(1, 3)], "some share cores"),
        ([range(1)] * 2, "more ranks than cores"),
        ([range(1), range(1, 2)], "bound to 1 each"),
        ([range(1)], "a single core"),
    ],
)
def test_cores(cores, words):
    (found,) = told(job([rank(cores=own) for own in cores]), "warn")
    assert found.topic == "cores"
    assert words in found.text


def test_gpus():
    gpu = {"gpus": ["NVIDIA A100"] * 2, "maker": "NVIDIA", "driver": "550.54", "cupy": "14.2", "nccl": "2.27.3"}
    assert told(job([rank(visible="0", **gpu), rank(visible="1", **gpu)]), "warn") == []
    assert "2 x NVIDIA A100, driver 550.54" in text(told(job([rank(**gpu)] * 2), "ok"))
    assert "share 2 GPUs" in text(told(job([rank(**gpu)] * 3), "warn"))
    assert "1 ranks may use none" in text(told(job([rank(visible="", **gpu)]), "warn"))
    assert "finds no NCCL" in text(told(job([rank(**{**gpu, "nccl": ""})]), "warn"))
    assert "CuPy cannot be imported" in text(told(job([rank(**{**gpu, "cupy": ""})]), "note"))
    assert "n2: none, though" in text(told(job([rank(**gpu), rank("n2")]), "warn"))


def test_memory_limits_and_files():
    model = {"path": "m.gguf", "type": "nfs4", "point": "/home", "bytes": 40 * GIB, "read": 1e8}
    made = job([rank("n1"), rank("n2")], model=model)
    assert "n1, n2: 8 GiB may be used, but the share of the model is 20.00 GiB" in text(told(made, "broken"))
    assert "nfs4 (/home)" in text(told(made, "warn"))
    lustre = replace(made, model={**model, "type": "lustre", "bytes": GIB, "read": 5e9})
    assert told(lustre, "warn") == told(lustre, "broken") == []
    assert "cannot be read" in text(told(job([rank()], model={"error": "m.gguf: cannot be read"}), "broken"))
    small = rank(shm=(64 << 20, 1 << 20), infiniband=["mlx5_0"], limits={**LIMITS, "memlock": 65536, "nofile": 256})
    assert {finding.topic for finding in told(job([small] * 2), "warn")} == {"memory", "limits"}


def test_slow_network():
    slow = {("between", "ping-pong", 8): 6e-5, ("between", "ping-pong", 4 << 20): 0.04}
    assert "--tp" in told(job([rank("n1"), rank("n2")], times=slow), "warn")[0].fix
    made = job([rank("n1", infiniband=["mlx5_0"]), rank("n2")], times=slow)
    assert "mlx5_0 is there" in told(made, "warn")[0].fix


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("processor\t: 0\nmodel\t\t: 1\nmodel name\t: AMD EPYC\ncache size\t: 512 KB\n", "AMD EPYC"),
        ("processor\t: 0\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: 0xd4f\n", "Neoverse V2"),
        ("CPU implementer\t: 0x46\nCPU variant\t: 0x1\nCPU part\t: 0x001\n", "A64FX"),
        ("CPU implementer\t: 0x41\nCPU part\t: 0xfff\n", "ARM processor 0x41 0xfff"),
        ("processor: 0\n", ""),
        (None, ""),
    ],
)
def test_processor(text, name, tmp_path):
    path = tmp_path / "cpuinfo"
    if text is not None:
        path.write_text(text)
    assert processor(path) == name


def test_batch_system_and_launcher():
    env = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_JOB_END_TIME": str(int(time.time()) + 100)}
    assert batch_system(env) == ("Slurm", "7")
    assert launcher(env) == "srun"
    assert launcher({**env, "OMPI_COMM_WORLD_RANK": "0"}) == "Open MPI's mpirun"
    assert (batch_system({}), launcher({})) == (("", ""), "")
    left = slurm_seconds_left(env)
    assert left is not None
    assert 95 < left <= 100
    assert "ends in" in text(told(job([rank()], batch=("Slurm", "7"), seconds_left=left), "warn"))
    assert "in a job of 4 tasks" in text(told(job([rank()], launcher="", batch_tasks=4), "warn"))


MOUNTS = r"""
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
30 22 0:30 / /scratch rw shared:1 - lustre 10.0.0.1@o2ib:/scratch rw,flock
31 22 0:31 / /scratch/my\040models rw master:2 - tmpfs tmpfs rw
32 22 0:32 / /home rw - autofs systemd-1 rw
33 32 0:33 / /home rw - nfs4 server:/home rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/scratch/a.gguf", ("lustre", "/scratch")),
        ("/scratch/my models/a.gguf", ("tmpfs", "/scratch/my models")),
        ("/scratchy/a.gguf", ("ext4", "/")),
        ("/home/a.gguf", ("nfs4", "/home")),
    ],
)
def test_file_system(path, expected):
    assert file_system(path, MOUNTS) == expected


def test_ranks_read_different_parts(tmp_path, rng):
    path = tmp_path / "m.gguf"
    size = int(rng.integers(9 << 20, 20 << 20))
    path.write_bytes(bytes(size))
    for rank_ in range(2):
        n, seconds = read_speed([str(path)], rank_, 2)
        assert n == size // 2
        assert seconds > 0
