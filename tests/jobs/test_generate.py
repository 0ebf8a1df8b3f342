"""`mpillama generate` and `logits` as users start them, on 1 to 4 ranks and without mpirun."""

import json
import re
import struct

import gguf
import numpy as np
import pytest

from job import run
from mpillama.gguf.types import GGMLType
from shared import shared
from tiny import nmse, run_on, write_llama

STORIES = ("models", "stories260K")


def reference():
    return json.loads(shared(*STORIES, "reference.json").read_text())


def stories():
    return shared(*STORIES, "stories260K-f32.gguf")


@pytest.mark.parametrize("n_ranks", [0, 1, 2, 3, 4])
def test_greedy_text_is_the_reference(n_ranks):
    expected = reference()
    n = len(expected["greedy_ids"])
    ended = run(
        ["generate", "-m", stories(), "-p", expected["prompt"], "-n", n, "--temp", 0, "--no-display-prompt"], n_ranks
    )
    assert ended.code == 0, ended.err
    assert ended.out == expected["greedy_text"] + "\n"
    assert ended.err == ""


def test_prompt_is_shown_unless_told_otherwise():
    ended = run(["-m", stories(), "-p", "Once upon a time", "-n", 3, "--temp", 0])
    assert ended.out.startswith("Once upon a time, there")


def test_seed_repeats_a_text_on_any_number_of_ranks():
    arguments = ["generate", "-m", stories(), "-p", "One day", "-n", 40, "-s", 7, "--temp", 1.0]
    first = run(arguments)
    assert run(arguments).out == first.out
    assert run(arguments, 3).out == first.out
    assert run([*arguments[:-3], 8, *arguments[-2:]]).out != first.out


def with_metadata(data, **numbers):
    """Return a GGUF file with more metadata, which makes it longer by whole pages: what follows stays aligned."""
    added = b"".join(
        struct.pack(f"<Q{len(key)}sIf", len(key), key.encode(), gguf.GGUFValueType.FLOAT32, value)
        for key, value in numbers.items()
    )
    n_tensors, n_kv = struct.unpack_from("<QQ", data, 8)
    text = b" " * (4096 - (len(added) + 8 + 3 + 4 + 8) % 4096)
    added += struct.pack(f"<Q3sIQ{len(text)}s", 3, b"pad", gguf.GGUFValueType.STRING, len(text), text)
    return data[:8] + struct.pack("<QQ", n_tensors, n_kv + len(numbers) + 1) + added + data[24:]


def test_what_the_model_recommends_is_the_default(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(with_metadata(stories().read_bytes(), **{"general.sampling.temp": 0.0}))
    arguments = ["generate", "-m", path, "-p", "Once upon a time", "-n", 12]
    greedy = run([*arguments[:2], stories(), *arguments[3:], "--temp", 0]).out
    assert run(arguments).out == run(arguments, 2).out == greedy
    assert run([*arguments, "--temp", 5, "-s", 1]).out != greedy
    path.write_bytes(with_metadata(stories().read_bytes(), **{"general.sampling.top_p": 2.0}))
    ended = run(arguments)
    assert ended.code == 1
    assert ended.err.count("\n") == 1
    assert "general.sampling.top_p of the model: --top-p must be between 0 and 1" in ended.err


def test_without_an_mpi_library():
    code = (
        "import sys; sys.modules['mpi4py'] = None; from mpillama.cli.main import main;"
        f"sys.exit(main(['generate', '-m', {str(stories())!r}, '-p', 'Once', '-n', '3', '--temp', '0']))"
    )
    ended = run([], program=("-c", code))
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith("Once")


def test_the_demo_model_is_the_default():
    ended = run(["generate", "-p", "Once upon a time", "-n", 20, "-s", 1], 2)
    assert ended.code == 0, ended.err
    assert ended.out.startswith("Once upon a time")
    assert len(ended.out.split()) > 12


def test_verbose_says_layout_bytes_memory_and_timings():
    ended = run(["generate", "-m", stories(), "-p", "Once", "-n", 5, "-v", "-ts", "2,1,1"], 3)
    assert ended.code == 0
    assert re.search(r"layout: 3 ranks on 1 host, .*tensor split 50,25,25 %", ended.err)
    for rank in range(3):
        assert re.search(rf"rank {rank} on \S+: share .*, read .*, peak memory", ended.err)
    for term in ("load time", "prompt eval time", "eval time", "tokens per second"):
        assert term in ended.err


def test_log_file_gets_what_stderr_does_not(tmp_path):
    ended = run(["generate", "-m", stories(), "-p", "Once", "-n", 5, "--log-file", tmp_path / "log"], 2)
    assert ended.err == ""
    assert "eval time" in (tmp_path / "log").read_text()


def test_stop_string():
    ended = run(
        [
            "generate",
            "-m",
            stories(),
            "-p",
            "Once upon a time",
            "-n",
            60,
            "--temp",
            0,
            "-r",
            "Lily",
            "--no-display-prompt",
        ]
    )
    assert ended.out == ", there was a little girl named \n"


def test_full_context_ends_the_text():
    ended = run(["generate", "-m", stories(), "-p", "Once upon a time", "-c", 32, "--temp", 0, "-v"], 2)
    assert ended.code == 0
    assert "context of 32 tokens is full" in ended.err


@pytest.mark.parametrize("n_ranks", [0, 1, 2, 4])
def test_logits_command(n_ranks, tmp_path):
    golden = np.load(shared("golden", "gemma2-dense.npz"))
    tokens = ",".join(map(str, golden["tokens"].tolist()))
    flags = ["-ctk", "f32", "-ctv", "f32", "-ub", 10, "--out", tmp_path / "l.npy"]
    ended = run(["logits", "-m", shared("golden", "gemma2-dense.gguf"), "--tokens", tokens, *flags], n_ranks)
    assert (ended.code, ended.err) == (0, "")
    logits = np.load(tmp_path / "l.npy")
    assert logits.dtype == np.float32
    assert logits.shape == golden["logits"].shape
    assert nmse(logits, golden["logits"]) <= 1e-6


def test_logits_from_a_file_of_tokens(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng, GGMLType.Q4_K)
    tokens = rng.integers(0, 96, 20).tolist()
    (tmp_path / "ids").write_text("\n".join(map(str, tokens)))
    ended = run(
        ["logits", "-m", path, "--tokens-file", tmp_path / "ids", "--out", tmp_path / "l.npy", "-ctk", "f32"], 3
    )
    assert ended.code == 0, ended.err
    assert nmse(np.load(tmp_path / "l.npy"), run_on(path, tokens, [1.0])[0]) < 1e-5


def test_peak_memory_is_the_share_and_a_constant(tmp_path, rng):
    path = write_llama(
        tmp_path / "m.gguf",
        rng,
        GGMLType.Q8_0,
        n_embd=1024,
        n_head=16,
        n_head_kv=16,
        n_ff=8192,
        n_layer=8,
        n_vocab=4096,
    )
    size = path.stat().st_size
    assert size > 200e6
    ended = run(["logits", "-m", path, "--tokens", "1,2,3", "--out", tmp_path / "l.npy", "-v"], 3)
    assert ended.code == 0, ended.err
    units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
    peaks = [float(x) * units[u] for x, u in re.findall(r"peak memory ([\d.]+) (\w+)", ended.err)]
    assert len(peaks) == 3
    assert max(peaks) < size / 3 * 1.05 + 250e6
    read = [float(x) * units[u] for x, u in re.findall(r", read ([\d.]+) (\w+)", ended.err)]
    assert sum(read) < 1.02 * size
