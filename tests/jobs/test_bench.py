"""`mpillama bench` as users start it: on one rank and on several, of shapes and of files."""

import csv
import io
import json
import os
import signal
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from job import finish, run, soon, start
from mpillama.bench.output import SQL_TABLE
from tiny import write_llama

TINY = ["bench", "--shape", "tiny", "-p", "24", "-n", "4", "-r", "2", "-t", "1"]


@pytest.mark.parametrize(("n_ranks", "backend"), [(0, "reference"), (2, "reference"), (3, "reference"), (2, "cpu")])
def test_shape_on_ranks(n_ranks, backend):
    if backend == "cpu" and find_spec("mpillama._cpu") is None:
        pytest.skip("the cpu backend is not built")
    ended = run([*TINY, "--backend", backend, "-pg", "8,2", "-d", "0,40", "-o", "json", "--progress"], n_ranks)
    assert ended.code == 0, ended.err
    rows = json.loads(ended.out)
    names = ["pp24", "tg4", "pp8+tg2"]
    assert [row["test"] for row in rows] == names + [f"{name} @ d40" for name in names]
    size = max(1, n_ranks)
    for row in rows:
        n_tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == pytest.approx([1e9 * n_tokens / ns for ns in row["samples_ns"]])
        assert row["avg_ns"] == pytest.approx(sum(row["samples_ns"]) / 2, abs=1)
        assert row["avg_ts"] == pytest.approx(sum(row["samples_ts"]) / 2)
        assert (row["n_ranks"], row["n_threads"], row["backends"]) == (size, 1, backend)
        n_bytes = row["weight_bytes"] + row["kv_bytes"]
        assert row["read_gbps"] == pytest.approx(n_bytes * n_tokens * 2 / sum(row["samples_ns"]))
        assert row["stream_share"] == pytest.approx(row["read_gbps"] / row["stream_gbps"])
        assert (row["comm_us"] > 0) == (size > 1)
        assert (row["skew_us"] > 0) == (size > 1)
        assert (row["host_us"] is not None) == (backend == "cpu")
        assert row["host_us"] is None or 0 < row["host_us"] < 1e6 / min(row["samples_ts"])
        assert 0 <= row["comm_min_us"] <= row["comm_us"]
    generation = rows[1]
    # The embedding, two in each of four blocks, and the logits; bytes of float32.
    expected = (10, 4 * (256 * 9 + 2048)) if size > 1 else (0, 0)
    assert (generation["comm_calls"], generation["comm_bytes"]) == expected
    assert ended.err.count("streaming reads") == 1
    assert ended.err.count("loading tiny Q8_0") == 1
    assert ended.err.count("filling the context to 40") == 1


def test_formats():
    def out(format):
        ended = run(["bench", "--shape", "tiny", "-p", "0", "-n", "2", "-r", "2", "-o", format, "-oe", "jsonl"])
        assert ended.code == 0, ended.err
        (line,) = ended.err.splitlines()
        return ended.out, json.loads(line)

    text, row = out("csv")
    assert next(csv.DictReader(io.StringIO(text)))["avg_ts"] == str(row["avg_ts"])
    text, row = out("sql")
    with sqlite3.connect(":memory:") as database:
        database.executescript(text)
        assert database.execute(f"SELECT test, avg_ts FROM {SQL_TABLE}").fetchall() == [("tg2", row["avg_ts"])]
    text, row = out("md")
    assert f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}" in text


def test_files_splits_and_cache_types(tmp_path, rng):
    paths = [write_llama(tmp_path / f"{name}.gguf", rng) for name in "ab"]
    words = [
        "bench",
        "-m",
        ",".join(map(str, paths)),
        "-ts",
        "1/1,3/1",
        "-ctk",
        "f32,f16",
        "-p",
        "5",
        "-n",
        "0",
        "-r",
        "1",
    ]
    ended = run([*words, "-o", "jsonl", "--progress"], 2)
    assert ended.code == 0, ended.err
    rows = [json.loads(line) for line in ended.out.splitlines()]
    assert [(row["model_filename"], row["tensor_split"], row["type_k"]) for row in rows] == [
        (str(path), split, kind) for path in paths for split in ("1/1", "3/1") for kind in ("f32", "f16")
    ]
    assert ended.err.count("loading") == 4
    assert rows[0]["model_type"].startswith("llama ")
    assert rows[0]["model_type"].endswith(" F32")


def test_splits_that_the_ranks_find_out():
    ended = run(["bench", "--shape", "tiny", "-ts", "auto,memory,1/1", "-p", 0, "-n", 2, "-r", 1, "-o", "jsonl"], 2)
    assert ended.code == 0, ended.err
    measured, memory, even = (json.loads(line)["tensor_split"] for line in ended.out.splitlines())
    assert even == "1/1"
    assert [float(share) for share in memory.split("/")] == pytest.approx([1, 1], rel=0.1)
    shares = [float(share) for share in measured.split("/")]
    assert len(shares) == 2
    assert min(shares) == 1


def test_the_table_of_scaling():
    """Measured and predicted by the example, each in a row, and what is only predicted in a table of its own."""
    script = Path(__file__).parents[2] / "examples" / "scaling.py"
    words = ["--shape", "tiny:Q8_0", "--ranks", "2", "-p", "8", "-n", "2", "-r", "1", "--rounds", "1"]
    words += ["--cluster", "llama-1b:Q4_0,a100-40g,hdr,2,1"]
    told = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, timeout=100)
    assert told.returncode == 0, told.stderr
    mine, others = told.stdout.split("Not measured; ")
    cells = [cell.strip() for cell in mine.strip().splitlines()[-1].strip("|").split("|")]
    assert cells[0] == "2"
    assert len(cells) == 7
    assert all(float(cells[i]) > 0 for i in (1, 2, 4, 5))
    # Ratios are printed with two decimals.
    assert float(cells[3]) == pytest.approx(float(cells[1]) / float(cells[2]), rel=0.02, abs=0.006)
    assert others.strip().splitlines()[-1].startswith("| llama-1b:Q4_0 | 1 x 2 a100-40g, hdr | ")


@pytest.mark.parametrize("n_ranks", [0, 2])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "tini"], "unknown shape 'tini'"),
        (["--shape", "tiny:Q9"], "unknown type 'Q9'"),
        (["--shape", "tiny", "-ts", "1/2/3"], "shares are separated by /"),
        (["-m", "/no/such/model.gguf"], "no such file"),
        (["--shape", "llama-70b:F32", "-d", "131072", "-ctk", "f32"], "are free"),
        (["--shape", "tiny", "-p", "0", "-n", "0"], "nothing to run"),
        (["--shape", "tiny", "--plot", "/no/such/x.png"], ""),
    ],
)
def test_mistakes_are_told_once(words, message, n_ranks):
    ended = run(["bench", *words], n_ranks)
    assert ended.code != 0
    assert "Traceback" not in ended.err
    (line,) = [line for line in ended.err.splitlines() if "mpillama" in line]
    assert message in line


def test_compare_without_the_package(tmp_path):
    (tmp_path / "llama_cpp.py").write_text("raise ModuleNotFoundError('No module named llama_cpp')\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    ended = run([*TINY, "--compare", "llama.cpp"], 2, env={"PYTHONPATH": path})
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.count("pip install llama-cpp-python") == 1


def test_compare(tmp_path):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    ended = run([*TINY, "--compare", "llama.cpp", "-o", "json"], 2)
    assert ended.code == 0, ended.err
    for row in json.loads(ended.out):
        ratios = [a / b for a, b in zip(row["samples_ts"], row["peer_samples_ts"], strict=True)]
        assert row["peer_ratio"] == pytest.approx(sum(ratios) / 2)
        assert row["peer"].startswith("llama.cpp")


def test_interrupted():
    job = start(["bench", "--shape", "tiny", "-p", "0", "-n", "4000", "-r", "50", "--progress", "-t", "1"], 2)
    assert any("repetition" in line for line in iter(job.stderr.readline, ""))
    job.send_signal(signal.SIGINT)
    ended = finish(job, 20)
    assert ended.code != 0
    assert "Traceback" not in ended.err
    assert ended.seconds < soon()
