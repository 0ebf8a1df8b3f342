"""Batch jobs that are killed, signalled and run out of room, and what their files hold in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from job import finish, ranks_of, run, soon, start

# MPILLAMA_BATCH_LINES=2000 MPILLAMA_BATCH_KILLS=20 is the long form of the first test.
N_LINES = int(os.environ.get("MPILLAMA_BATCH_LINES", "120"))
N_KILLS = int(os.environ.get("MPILLAMA_BATCH_KILLS", "4"))


def requests(tmp_path, n, max_tokens=3):
    path = tmp_path / "in.jsonl"
    with path.open("w") as file:
        for i in range(n):
            body = {"prompt": f"Once upon a time {i}", "max_tokens": max_tokens, "seed": i}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def answers(path):
    """Return the answers by id; every line must be whole, and no id there twice."""
    data = path.read_bytes() if path.exists() else b""
    assert data.endswith(b"\n") or not data
    lines = [json.loads(line) for line in data.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def command(source, target, *more):
    return ["batch", "-i", source, "-o", target, "-c", 1024, "-t", 1, *more]


@pytest.mark.timeout(60 + 6 * N_KILLS + N_LINES)
def test_killed_again_and_again(tmp_path):
    source, target = requests(tmp_path, N_LINES), tmp_path / "out.jsonl"
    random_, done = random.Random(N_KILLS), 0
    for _ in range(N_KILLS):
        job = start(command(source, target, "-np", 4), 2)
        pids, began = ranks_of(job, 2), time.monotonic()
        wanted = done + random_.randrange(1, max(2, 2 * N_LINES // N_KILLS))
        while job.poll() is None and time.monotonic() - began < 30:
            if target.exists() and target.read_bytes().count(b"\n") >= min(wanted, N_LINES - 1):
                break
            time.sleep(0.002)
        time.sleep(random_.random() * 0.01)
        for pid in random_.sample(pids, random_.choice([1, 2])):
            os.kill(pid, signal.SIGKILL)
        finish(job)
        done = target.read_bytes().count(b"\n")
    ended = run(command(source, target), 2, limit=60 + N_LINES)
    assert ended.code == 0, ended.err
    assert "complete" in ended.err
    assert all(line.startswith("mpillama batch: ") for line in ended.err.splitlines()), ended.err
    found = answers(target)
    assert set(found) == {f"r{i}" for i in range(N_LINES)}
    assert all(line["response"]["status_code"] == 200 for line in found.values())


@pytest.mark.parametrize("how", [signal.SIGUSR1, signal.SIGTERM, "--time-limit"])
def test_stops_in_time_and_goes_on(tmp_path, how):
    """With a code that job scripts requeue on, and nothing that was finished is lost."""
    source, target = requests(tmp_path, 400, 30), tmp_path / "out.jsonl"
    limits = ["--time-limit", "3s", "--margin", "1s"] if how == "--time-limit" else []
    job = start(command(source, target, "-np", 4, "--grace", "1s", *limits), 2)
    if not limits:
        pids = ranks_of(job, 2)
        while not target.exists() or target.read_bytes().count(b"\n") < 5:
            assert job.poll() is None
            time.sleep(0.01)
        # Batch systems signal all ranks.
        for pid in pids:
            os.kill(pid, how)
        began = time.monotonic()
        ended = finish(job)
        assert time.monotonic() - began < 5
    else:
        ended = finish(job, 20)
    assert ended.code == 75, ended.err
    assert "run the same command again" in ended.err
    first = answers(target)
    assert 0 < len(first) < 400 or limits
    short = requests(tmp_path, len(first) + 5, 30)
    ended = run(command(short, target), 2)
    assert ended.code == 0, ended.err
    again = answers(target)
    assert {name: again[name] for name in first} == first
    assert set(again) >= {f"r{i}" for i in range(len(first) + 5)}


def test_ctrl_c_ends_it_at_once_and_keeps_what_is_done(tmp_path):
    source, target = requests(tmp_path, 400, 30), tmp_path / "out.jsonl"
    job = start(command(source, target, "-np", 4), 2)
    pids = ranks_of(job, 2)
    while not target.exists() or target.read_bytes().count(b"\n") < 3:
        assert job.poll() is None
        time.sleep(0.01)
    for pid in pids:
        os.kill(pid, signal.SIGINT)
    ended = finish(job, 10)
    assert ended.code == 130
    assert "Traceback" not in ended.err
    assert len(answers(target)) >= 3


def test_bad_lines_become_error_lines(tmp_path):
    source, target = requests(tmp_path, 3), tmp_path / "out.jsonl"
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    with source.open("a") as file:
        file.write("{oops\n")
        file.write(json.dumps({"custom_id": "r1", "url": "/v1/completions", "body": {"prompt": "again"}}) + "\n")
        file.write(json.dumps({"custom_id": "wrong", "url": "/v1/completions", "body": {"prompt": 5}}) + "\n")
        file.write(json.dumps({"custom_id": "chat", "url": "/v1/chat/completions", "body": chat}) + "\n")
        file.write(json.dumps({"custom_id": "vector", "url": "/v1/embeddings", "body": {"input": ["a", "b"]}}) + "\n")
    ended = run(command(source, target), 2)
    assert ended.code == 0, ended.err
    assert "4 answered, 3 failed, 0 answered earlier, 1 repeated" in ended.err
    found = answers(target)
    assert len(found) == 7
    assert "line 4: not JSON" in found[None]["error"]["message"]
    assert found["wrong"]["response"]["status_code"] == 400
    assert "prompt" in found["wrong"]["response"]["body"]["error"]["message"]
    assert found["chat"]["response"]["status_code"] == 400
    assert len(found["vector"]["response"]["body"]["data"]) == 2
    ended = run(command(source, target), 2)
    assert ended.code == 0
    assert "0 answered, 0 failed, 7 answered earlier, 1 repeated" in ended.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-i", "none.jsonl", "-o", "out.jsonl"], "-i none.jsonl: No such file"),
        (["-i", "in.jsonl", "-o", "in.jsonl"], "-i and -o name the same file"),
        (["-i", "in.jsonl", "-o", "no/such/out.jsonl"], "-o no/such/out.jsonl: No such file"),
        (["-i", "in.jsonl", "-o", "/proc/out.jsonl"], "-o /proc/out.jsonl: "),
        (["-i", "in.jsonl", "-o", "notes.txt"], "not a result of mpillama batch"),
        (["-i", "in.jsonl"], "-o"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "--time-limit", "soon"], "--time-limit"),
        (["-i", "in.jsonl", "-o", "out.jsonl", "-np", "64", "-ub", "32"], "-np 64"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    requests(tmp_path, 1)
    (tmp_path / "notes.txt").write_text("mine\n")
    ended = run(["batch", *arguments], 2)
    assert ended.code != 0
    lines = [line for line in ended.err.splitlines() if "mpillama" in line]
    assert len(lines) == 1, ended.err
    assert lines[0].startswith("mpillama: error: ")
    assert said in lines[0]
    assert ended.seconds < soon()
    assert (tmp_path / "notes.txt").read_text() == "mine\n"


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """The limit on the size of files stands for the disk."""
    source, target = requests(tmp_path, 40), tmp_path / "out.jsonl"
    words = [sys.executable, "-m", "mpillama", *map(str, command(source, target))]
    limited = subprocess.run(
        ["bash", "-c", 'trap "" XFSZ; ulimit -f 8; exec "$@"', "-", *words],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert limited.returncode == 1
    assert "Traceback" not in limited.stderr
    assert "are safe: make room and run the same command again" in limited.stderr
    before = answers(target)
    assert 0 < len(before) < 40
    assert run(command(source, target)).code == 0
    assert len(answers(target)) == 40
