"""Whatever goes wrong, a job says why in one line and ends on every rank, soon."""

import os
import signal
import subprocess
import sys

import pytest

from job import finish, launcher, mpirun, ranks_of, run, soon, start
from shared import shared
from tiny import write_llama


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    import numpy as np

    return write_llama(tmp_path_factory.mktemp("model") / "m.gguf", np.random.default_rng(1))


def damaged(model, tmp_path, how):
    data = model.read_bytes()
    path = tmp_path / "bad.gguf"
    if how == "empty":
        data = b""
    elif how == "truncated in the header":
        data = data[:700]
    elif how == "truncated in the tensors":
        data = data[:-5000]
    elif how == "magic":
        data = b"GGML" + data[4:]
    elif how == "version":
        data = data[:4] + (99).to_bytes(4, "little") + data[8:]
    elif how == "tensor count":
        data = data[:8] + (1 << 60).to_bytes(8, "little") + data[16:]
    elif how == "architecture":
        data = data.replace(b"llama", b"lluma")
    path.write_bytes(data)
    return path


def assert_told_once(ended, *words):
    assert ended.code != 0
    assert "Traceback" not in ended.err
    ours = [line for line in ended.err.splitlines() if "mpillama" in line]
    assert len(ours) == 1, ended.err
    assert ours[0].startswith("mpillama: error:")
    for word in words:
        assert word in ours[0]
    assert ended.seconds < soon()


@pytest.mark.parametrize("n_ranks", [0, 3])
@pytest.mark.parametrize(
    ("how", "word"),
    [
        ("empty", "is empty"),
        ("truncated in the header", "truncated"),
        ("truncated in the tensors", "missing"),
        ("magic", "not a GGUF file"),
        ("version", "version 99"),
        ("tensor count", "too many"),
        ("architecture", "architecture 'lluma' is not supported"),
    ],
)
def test_damaged_file(model, tmp_path, how, word, n_ranks):
    assert_told_once(
        run(["logits", "-m", damaged(model, tmp_path, how), "--tokens", "1", "--out", tmp_path / "o.npy"], n_ranks),
        word,
    )


@pytest.mark.parametrize("n_ranks", [0, 3])
@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["logits", "-m", "MODEL", "--tokens", "1,2", "--out", "OUT", "-ts", "1,1,1,1,1"], "-ts"),
        (["logits", "-m", "MODEL", "--tokens", "1", "--out", "OUT", "--tp", "4", "--pp", "2"], "needs 8 ranks"),
        (["logits", "-m", "MODEL", "--tokens", "1,96", "--out", "OUT"], "token 96"),
        (["logits", "-m", "MODEL", "--tokens", ",".join(["1"] * 40), "--out", "OUT", "-c", "32"], "raise -c"),
        (["logits", "-m", "MODEL", "--tokens", "1", "--out", "/no/such/folder/o.npy"], "does not exist"),
        (["generate", "-m", "MODEL", "-p", "hi", "-n", "0"], "-n 0"),
        (["generate", "-m", "MODEL", "-p", "hi"], "tokenizer"),
        (["generate", "-m", "MODEL", "-p", "hi", "--temperatur", "1"], "did you mean --temp"),
        (["generate", "-m", "MODEL", "-p", "hi", "--lora", "x"], "not support"),
        (["generate", "-m", "MODEL", "-f", "/no/such/prompt"], "No such file"),
        (["generate", "-m", "MODEL", "-p", "hi", "--top-p", "7"], "top-p"),
        (["generate", "-m", "/no/such/model.gguf", "-p", "hi"], "no such file"),
        (["generate", "-m", "/", "-p", "hi"], "directory"),
        (["inspect", "/no/such/model.gguf"], "no such file"),
        (["inspect", "MODEL", "-n", "2", "-ts", "1,2,3"], "-ts"),
        (["frobnicate"], "unknown command"),
    ],
)
def test_wrong_command_line(model, tmp_path, arguments, word, n_ranks):
    words = [{"MODEL": model, "OUT": tmp_path / "o.npy"}.get(a, a) for a in arguments]
    assert_told_once(run(words, n_ranks), word)


@pytest.mark.parametrize("n_ranks", [0, 3])
def test_prompt_longer_than_the_context(n_ranks):
    stories = shared("models", "stories260K", "stories260K-f32.gguf")
    ended = run(["generate", "-m", stories, "-p", "Once upon a time " * 40, "-c", 64], n_ranks)
    assert_told_once(ended, "tokens but the context holds 64")


@pytest.mark.parametrize("n_ranks", [0, 3])
def test_context_larger_than_the_memory(model, tmp_path, n_ranks):
    arguments = ["logits", "-m", model, "--tokens", "1", "--out", tmp_path / "o.npy", "-c"]
    ended = run([*arguments, 1 << 30], n_ranks)
    assert_told_once(ended, "for a KV cache of 1073741824 tokens", "the largest context that fits is -c ")
    largest = int(ended.err.split("fits is -c ")[1].split()[0])
    assert 10_000 < largest < 1 << 30
    assert run([*arguments, largest * 9 // 10], n_ranks).code == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(model, tmp_path):
    path = damaged(model, tmp_path, "")
    path.chmod(0)
    assert_told_once(run(["logits", "-m", path, "--tokens", "1", "--out", tmp_path / "o.npy"], 3), "Permission denied")


def endless():
    """Return the arguments of a job that generates until it is stopped."""
    stories = shared("models", "stories260K", "stories260K-f32.gguf")
    return ["generate", "-m", stories, "-p", "Once upon a time", "-c", "100000", "--ignore-eos"]


def wait_for_text(job):
    """Wait until the job has begun to print."""
    assert job.stdout.read(20)


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_ends_the_job(victim):
    job = start(endless(), 3)
    wait_for_text(job)
    os.kill(ranks_of(job, 3)[victim], signal.SIGKILL)
    ended = finish(job, 20)
    assert ended.code != 0
    assert ended.seconds < soon()
    assert "signal 9" in ended.out + ended.err  # the launcher says it, MPICH's on stdout


def test_a_killed_stage_ends_the_job():
    job = start([*endless(), "-sm", "layer"], 3)
    wait_for_text(job)
    os.kill(ranks_of(job, 3)[1], signal.SIGKILL)
    ended = finish(job, 20)
    assert ended.code != 0
    assert ended.seconds < soon()


@pytest.mark.parametrize("n_ranks", [0, 1, 3])
def test_ctrl_c(n_ranks):
    job = start(endless(), n_ranks)
    wait_for_text(job)
    os.killpg(job.pid, signal.SIGINT)
    ended = finish(job, 20)
    assert ended.seconds < soon()
    assert "Traceback" not in ended.err
    assert "mpillama: error" not in ended.err
    if "Open MPI" not in launcher():
        assert ended.code == 130


@pytest.mark.parametrize("victim", [0, 2])
def test_an_uncaught_exception_is_told_once_and_ends_all(victim):
    code = (
        "import sys, time\n"
        "from mpillama.spmd import run\n"
        "def main(world, interrupts):\n"
        f"    if world.rank == {victim}: raise ZeroDivisionError('a bug')\n"
        "    world.group().allreduce(__import__('numpy').zeros(3, 'f4'))\n"
        "    time.sleep(60)\n"
        "sys.exit(run(main))\n"
    )
    ended = run([], 3, program=("-c", code))
    assert ended.code != 0
    assert ended.seconds < soon()
    assert ended.err.count("ZeroDivisionError: a bug") == 1
    assert f"rank {victim} on " in ended.err


@pytest.mark.parametrize(("load", "victim"), [("direct", 0), ("direct", 1), ("bcast", 0)])
def test_an_error_of_one_rank_while_loading_is_told_once_and_ends_all(model, tmp_path, load, victim):
    code = (
        "import sys\n"
        "from mpi4py import MPI\n"
        "from mpillama import reading\n"
        "from mpillama.cli.main import main\n"
        "from mpillama.errors import GGUFError\n"
        "def fill(self, *_, **__): raise GGUFError('m.gguf: cannot read it')\n"
        f"if MPI.COMM_WORLD.rank == {victim}: reading.Files.fill = fill\n"
        f"flags = ['-m', {str(model)!r}, '--tokens', '1', '--out', {str(tmp_path / 'o.npy')!r}, '--load', {load!r}]\n"
        "sys.exit(main(['logits', *flags]))\n"
    )
    assert_told_once(run([], 3, program=("-c", code)), f"rank {victim} on ", "m.gguf: cannot read it")


def test_rank_0_tells_the_code_and_leaves_last():
    """Else launchers that kill the rest at the first bad code would tell theirs."""
    code = (
        "import sys, time\n"
        "from mpillama.spmd import run\n"
        "ranks = []\n"
        "def main(world, interrupts):\n"
        "    ranks.append(world.rank)\n"
        "    return 75\n"
        "code = run(main)\n"
        "sys.stdout.write(f'{time.monotonic()} {ranks[0]} {code}\\n')\n"
        "sys.exit(code)\n"
    )
    ended = run([], 3, program=("-c", code))
    assert ended.code == 75, ended.err
    told = sorted(tuple(map(float, line.split())) for line in ended.out.splitlines())
    assert {rank: code for _, rank, code in told} == {0: 75, 1: 0, 2: 0}
    assert told[-1][1] == 0


def test_a_launcher_of_another_family_is_explained(model, tmp_path):
    arguments = ["logits", "-m", model, "--tokens", "1", "--out", tmp_path / "o.npy"]
    ended = run(arguments, env={"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"})
    assert_told_once(ended, "started 4 processes", "sees 1", "MPI4PY_LIBMPI")
    assert ended.code == 2


@pytest.mark.parametrize("n_ranks", [0, 2])
def test_output_into_a_closed_pipe_is_no_error(n_ranks):
    if n_ranks and "Open MPI" in launcher():
        pytest.skip("Open MPI's launcher goes on reading when its own output is closed")
    limit = soon()
    command = [*mpirun(n_ranks), sys.executable, "-m", "mpillama", *map(str, endless())]
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    job.stdout.read(10)
    job.stdout.close()
    try:
        job.wait(limit)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert "Traceback" not in job.stderr.read()
