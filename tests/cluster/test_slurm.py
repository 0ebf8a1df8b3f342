"""The job script of launch/ under a real Slurm of two nodes."""

from __future__ import annotations

import json
import subprocess
import sys

from machines import MPILLAMA, ROOT, Slurm, clean_environment

SCRIPT = ROOT / "launch" / "slurm.sbatch"


def test_a_job_on_two_nodes_writes_what_one_process_writes(cluster: Slurm) -> None:
    # Without --deterministic, words that are about as likely may change places.
    arguments = ["generate", "-p", "Once upon a time", "-n", "24", "--temp", "0", "-t", "1", "--deterministic"]
    alone = subprocess.run(
        [*MPILLAMA.split(), *arguments], capture_output=True, text=True, cwd=ROOT, env=clean_environment()
    )
    out = cluster.folder / "job.out"
    job = cluster.submit("-N2", "--ntasks-per-node=2", "-t5", "-o", out, SCRIPT, *arguments)
    told = cluster.wait(job, "COMPLETED")
    assert told["NodeList"] == "n[1-2]"
    assert out.read_text() == alone.stdout
    assert len(alone.stdout.split()) > 15


def test_a_job_that_leaves_work_is_queued_again(cluster: Slurm) -> None:
    program = cluster.folder / "work.sh"
    # The first time there is work left, the second time there is none.
    program.write_text('[ -z "${SLURM_RESTART_COUNT:-}" ] && exit 75\necho "finished $*"\n')
    out = cluster.folder / "work.out"
    cluster.env["MPILLAMA"] = f"bash {program}"
    job = cluster.submit("-N1", "--ntasks-per-node=1", "-t5", "-o", out, SCRIPT, "batch", "jobs.jsonl")
    cluster.env["MPILLAMA"] = MPILLAMA
    cluster.wait(job, "PENDING")
    # Slurm holds a requeued job back for a while; an operator need not wait.
    cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now")
    told = cluster.wait(job, "COMPLETED")
    assert told["Restarts"] == "1"
    assert f"requeueing job {job}" in out.read_text()
    assert out.read_text().rstrip().endswith("finished batch jobs.jsonl")


def test_an_error_ends_the_job_with_its_code(cluster: Slurm) -> None:
    out = cluster.folder / "error.out"
    job = cluster.submit("-N2", "--ntasks-per-node=1", "-t5", "-o", out, SCRIPT, "generate", "-m", "/no/model.gguf")
    assert cluster.wait(job, "FAILED")["ExitCode"] != "0:0"
    assert out.read_text().count("mpillama: error: ") == 1
    assert "/no/model.gguf" in out.read_text()


def test_doctor_under_srun(cluster: Slurm) -> None:
    """As one job with the right interface, and as four jobs of one rank with the wrong one."""
    doctor = [sys.executable, "-m", "mpillama", "doctor", "--json"]
    right = cluster.run("srun", "-K1", "-N2", "--ntasks-per-node=2", "-t5", "--mpi=pmi2", *doctor)
    assert right.returncode == 0, right.stderr + right.stdout
    found = json.loads(right.stdout)
    assert (found["launched"], found["world_size"], found["launcher"]) == (4, 4, "srun")
    assert found["batch"][0] == "Slurm"
    assert 200 < found["seconds_left"] <= 300
    assert {time["what"] for time in found["times"]} == {"ping-pong", "allreduce"}

    wrong = cluster.run("srun", "-K1", "-N2", "--ntasks-per-node=2", "-t5", "--mpi=none", *doctor)
    assert wrong.returncode != 0
    found = json.loads(wrong.stdout)
    assert found["broken"]
    assert (found["launched"], found["world_size"]) == (4, 1)
    assert "started 4 processes" in found["stranded"]
    assert "--mpi=pmi2" in found["stranded"]


def test_ranks_that_cannot_join_are_told_once(cluster: Slurm) -> None:
    generate = [sys.executable, "-m", "mpillama", "generate", "-p", "Once", "-n", "2"]
    told = cluster.run("srun", "-K1", "-N2", "--ntasks-per-node=2", "-t5", "--mpi=none", *generate)
    assert told.returncode != 0
    assert told.stderr.count("mpillama: error: ") == 1
    assert "started 4 processes, but" in told.stderr
    assert "Traceback" not in told.stderr
    assert told.stdout == ""
