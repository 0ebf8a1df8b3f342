"""Jobs on GPUs that are not there: `--backend cuda` and `hip` through CuPy and NCCL or RCCL."""

import os
import signal
import subprocess
import sys

import numpy as np
import pytest

import run_gpu
from job import finish, launcher, ranks_of, run, start
from mpillama.gguf.types import GGMLType
from shared import shared
from tiny import nmse, write_llama

KIND = os.environ.get("MPILLAMA_TEST_GPU", "")
OWN, OTHER = ("ROCm", "cuda") if KIND == "hip" else ("CUDA", "hip")
# Without what stands for the driver.
NO_DRIVER = "libamdhip64.so.7: cannot open" if KIND == "hip" else "cudaErrorInsufficientDriver"
GPUS = {"EMULATED_GPUS": "4"}
# Steps are recorded only on CUDA; here they can be.
RECORDS = """
import sys
from mpillama.backends.gpu.cupy_device import CupyDevice
from mpillama.cli.main import main
make = CupyDevice.__init__
def recording(self, *args):
    make(self, *args)
    self.can_capture = True
CupyDevice.__init__ = recording
sys.exit(main(sys.argv[1:]))
"""


def logits(model, tmp_path, n_ranks, *more, program=("-m", "mpillama"), **env):
    out = tmp_path / "out.npy"
    tokens = ",".join(str(1 + 7 * i % 90) for i in range(20))
    # Keys that float16 would round may be between two of its numbers.
    cache = "-ctk", "f32", "-ctv", "f32"
    arguments = ["logits", "-m", model, "--tokens", tokens, "-ub", 1, "--out", out, *cache, *more]
    ended = run(arguments, n_ranks, limit=120, env=GPUS | env, program=program)
    assert ended.code == 0, ended.err
    assert not ended.err.strip()
    return np.load(out)


@pytest.mark.parametrize("experts", [False, True])
def test_ranks_compute_what_one_process_computes(experts, tmp_path, rng):
    more = {"n_expert": 4, "n_expert_used": 2} if experts else {}
    model = write_llama(tmp_path / "m.gguf", rng, GGMLType.F16, n_vocab=96, n_ff=256, **more)
    exact = logits(model, tmp_path, 0, "--backend", "reference")
    gpus, by_host = ("--backend", KIND), {"MPILLAMA_COLLECTIVES": "host"}
    ways = {
        "one": logits(model, tmp_path, 0, *gpus),
        "NCCL": logits(model, tmp_path, 3, *gpus, "-ts", "2,1,1"),
        "recorded": logits(model, tmp_path, 2, *gpus, program=("-c", RECORDS)),
        "host": logits(model, tmp_path, 2, *gpus, **by_host),
        "MPI": logits(model, tmp_path, 3, *gpus, "--collectives", "mpi"),
        "an island and a CPU": logits(model, tmp_path, 3, "-dev", f"{KIND}:1,{KIND}:3,cpu"),
        "stages": logits(model, tmp_path, 2, *gpus, "--pp", "2") if experts else exact,
    }
    errors = {name: nmse(found, exact) for name, found in ways.items()}
    assert max(errors.values()) < 1e-9, errors
    assert (ways["recorded"] == logits(model, tmp_path, 2, *gpus, MPILLAMA_GRAPHS="0")).all()


@pytest.mark.parametrize(("wire", "bound"), [("bf16", 1e-4), ("f16", 1e-6)])
def test_sums_in_16_bits(wire, bound, tmp_path, rng):
    """Of one token and of many; the same by a recorded step."""
    model = write_llama(tmp_path / "m.gguf", rng, GGMLType.F16, n_vocab=96, n_ff=256)
    exact = logits(model, tmp_path, 2, "--backend", KIND)
    for more in ((), ("-ub", 7)):
        found = logits(model, tmp_path, 2, "--backend", KIND, "--wire", wire, *more)
        assert 0 < nmse(found, exact) < bound
    plain = logits(model, tmp_path, 2, "--backend", KIND, MPILLAMA_WIRE=wire, MPILLAMA_GRAPHS="0")
    assert (plain == logits(model, tmp_path, 2, "--backend", KIND, "--wire", wire, program=("-c", RECORDS))).all()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("1:join", "NCCL cannot join the GPUs"),
        ("2:call", "NCCL failed in allReduce"),
        ("0:later", "NCCL failed in"),
    ],
)
def test_a_rank_whose_nccl_fails_is_named_and_ends_all(fault, words):
    env = GPUS | {"EMULATED_NCCL_FAILS": fault}
    ended = run(["generate", "-p", "Once", "-n", 9, "--backend", KIND], 3, limit=40, env=env)
    assert ended.code == 1
    told = [line for line in ended.err.splitlines() if "mpillama: error" in line]
    assert len(told) == 1, ended.err
    assert told[0].startswith(f"mpillama: error: rank {fault[0]} on ")
    assert words in told[0]
    assert "Traceback" not in ended.err
    assert ended.seconds < 15


def test_ranks_of_a_node_compile_once(tmp_path):
    counts = []
    for n_ranks in (1, 3):
        count = tmp_path / f"{n_ranks}"
        env = GPUS | {"EMULATED_COMPILES": str(count), "CUPY_CACHE_DIR": str(tmp_path / f"cache{n_ranks}")}
        ended = run(["generate", "-p", "Once", "-n", 3, "--backend", KIND], n_ranks, limit=200, env=env)
        assert ended.code == 0, ended.err
        counts.append(count.stat().st_size)
    assert counts[0] > 3
    assert counts[1] == counts[0]


def test_what_gpus_need_and_have_is_said():
    ended = run(["generate", "-p", "Once", "-n", 1, "--backend", KIND, "-v"], 2, env=GPUS)
    assert ended.code == 0
    for rank in (0, 1):
        assert f"the GPU of rank {rank} on " in ended.err
    assert "with a KV cache of 512 tokens, and has 4.00 GiB free" in ended.err


def test_deterministic(tmp_path, rng):
    model = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q8_0, n_head=12, n_head_kv=12, n_ff=384, n_layer=1)
    one, three = (
        logits(model, tmp_path, n, "--backend", KIND, "--deterministic", MPILLAMA_COLLECTIVES="host") for n in (0, 3)
    )
    assert one.tobytes() == three.tobytes()


def test_a_model_in_another_thread_than_the_one_that_made_it():
    code = (
        "from concurrent.futures import ThreadPoolExecutor\n"
        "from mpillama import LLM, GenerationParams\n"
        f"with LLM(backend='{KIND}') as llm, ThreadPoolExecutor(1) as other:\n"
        "    ask = lambda: llm.generate('Once upon a time', GenerationParams(max_tokens=12, temperature=0))[0].text\n"
        "    print(ask() == other.submit(ask).result(), ask())\n"
    )
    ended = run([], program=("-c", code), env=GPUS)
    assert ended.out.startswith("True , there was a little girl"), ended.err


@pytest.mark.parametrize(
    ("n_ranks", "flags", "env", "words"),
    [
        (2, ["--backend", KIND], {"EMULATED_GPUS": "1"}, "ranks 0 and 1 would share a GPU"),
        (2, ["--backend", KIND], {"EMULATED_GPUS": "0"}, "there is no usable GPU here (hipErrorNoDevice)"),
        (2, ["--backend", OTHER], {}, f"the installed CuPy is the one for {OWN}"),
        (2, ["-dev", f"{KIND}:0,{KIND}:9"], {}, f"{KIND}:9 is not visible"),
        (3, ["--backend", KIND], {"EMULATED_MEMORY": "100000000"}, "GPU of rank 0"),
        (0, ["--backend", KIND], {"LD_LIBRARY_PATH": ""}, NO_DRIVER),
    ],
)
def test_what_is_missing_is_said_once(n_ranks, flags, env, words):
    ended = run(["generate", "-p", "Once", "-n", 3, *flags], n_ranks, env=GPUS | env)
    assert ended.code in (1, 2)
    assert words in ended.err
    assert ended.err.count("mpillama: error") == 1
    assert "Traceback" not in ended.err


def endless():
    stories = shared("models", "stories260K", "stories260K-f32.gguf")
    return ["generate", "-m", stories, "-p", "Once upon a time", "-c", "100000", "--ignore-eos", "--backend", KIND]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_the_job(victim):
    job = start(endless(), 2, env=GPUS)
    assert job.stdout.read(20)
    os.kill(ranks_of(job, 2)[victim], signal.SIGKILL)
    ended = finish(job, 30)
    assert ended.code != 0
    assert ended.seconds < 15


def test_ctrl_c():
    job = start(endless(), 2, env=GPUS)
    assert job.stdout.read(20)
    os.killpg(job.pid, signal.SIGINT)
    ended = finish(job, 30)
    assert "Traceback" not in ended.err
    assert ended.seconds < 15
    if "Open MPI" not in launcher():
        assert ended.code == 130


def test_what_test_gpu_does_with_ranks():
    command = [sys.executable, run_gpu.__file__, "--backend", KIND, "--only", "ranks"]
    done = subprocess.run(command, env=os.environ | GPUS, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("squared error relative to one rank") == 5
