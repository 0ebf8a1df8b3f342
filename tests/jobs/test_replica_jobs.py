"""Replicas as users start them: `batch`, `serve` and `LLM` with ``--dp``."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from job import finish, ranks_of, run, start
from server import Server
from shared import shared


def model():
    return shared("models", "stories260K", "stories260K-f32.gguf")


def write_requests(path, n):
    with path.open("w") as file:
        for i in range(n):
            body = {"prompt": f"Once upon a time {i}, there was", "max_tokens": 12, "temperature": 0}
            body |= {"response_format": {"type": "json_object"}} if i % 9 == 0 else {}
            line = {"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")
    return path


def answers(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["custom_id"]: line["response"]["body"]["choices"][0]["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def test_replicas_answer_as_one_does_and_survive_being_killed(tmp_path):
    source, n = write_requests(tmp_path / "in.jsonl", 80), 80
    shown, target = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    flags = ["-c", 1024, "-t", 1, "-np", 4, "-ctk", "f32", "-ctv", "f32", "-v"]
    assert run(["batch", "-m", model(), "-i", source, "-o", shown, *flags]).code == 0
    command = ["batch", "-m", model(), "-i", source, "-o", target, "--dp", 2, *flags]
    job = start(command, 4)
    pids, began = ranks_of(job, 4), time.monotonic()
    while job.poll() is None and time.monotonic() - began < 30:
        if target.exists() and target.read_bytes().count(b"\n") >= 10:
            break
        time.sleep(0.002)
    # A rank of the replica that rank 0 is not in, and not its leader.
    os.kill(pids[3], signal.SIGKILL)
    assert finish(job, 10).code != 0
    done = target.read_bytes().count(b"\n")
    assert 10 <= done < n
    ended = run(command, 2)
    assert ended.code == 0, ended.err
    assert "2 ranks on 1 host, 2 replicas of 1 rank" in ended.err
    assert f"{n - done} answered" in ended.err
    expected, found = answers(shown), answers(target)
    assert set(found) == set(expected)
    # Two ranks add up in another order than one.
    assert sum(found[name] != expected[name] for name in expected) <= 1


@pytest.mark.parametrize("how", [signal.SIGUSR1, signal.SIGTERM])
def test_all_replicas_stop_in_time(tmp_path, how):
    source, target = write_requests(tmp_path / "in.jsonl", 3000), tmp_path / "out.jsonl"
    flags = ["-c", 1024, "-t", 1, "-np", 4, "--grace", "1s"]
    job = start(["batch", "-m", model(), "-i", source, "-o", target, "--dp", 2, *flags], 2)
    pids = ranks_of(job, 2)
    while not target.exists() or target.read_bytes().count(b"\n") < 5:
        assert job.poll() is None
        time.sleep(0.01)
    for pid in pids if how == signal.SIGTERM else pids[:1]:
        os.kill(pid, how)
    began = time.monotonic()
    ended = finish(job, 10)
    assert ended.code == 75, ended.err
    assert time.monotonic() - began < 5
    assert 5 <= len(answers(target)) < 3000


def test_a_server_with_replicas():
    ask = {"prompt": "Once upon a time", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    with Server("-m", model(), "--dp", 2, "-c", 1024, "-np", 2) as server:
        assert "2 replicas of 1 rank" in server.log.read_text()
        assert server.ask("/props")[1]["total_slots"] == 4
        with ThreadPoolExecutor(12) as pool:
            told = list(pool.map(lambda _: server.ask("/v1/completions", ask), range(12)))
        assert [status for status, _ in told] == [200] * 12
        assert len({body["choices"][0]["text"] for _, body in told}) == 1
        assert server.ask("/v1/completions", {**ask, "prompt": "word " * 2000})[0] == 400
        assert server.ask("/v1/completions", {**ask, "n": 3})[0] == 400
        endless = {**ask, "max_tokens": 900, "stream": True}
        sockets = [server.post_raw("/v1/completions", endless) for _ in range(4)]
        server.wait_for("llamacpp:requests_processing", [4])
        assert all(sock.recv(10) for sock in sockets)
        for sock in sockets[1:]:
            sock.close()
        server.wait_for("llamacpp:requests_processing", [1], limit=5)
        assert server.metric("mpillama_requests_cancelled_total") == 3
        sockets[0].close()
        server.wait_for("mpillama_kv_blocks_used", [0], limit=5)
        again = server.post_raw("/v1/completions", endless)
        again.recv(10)
        os.kill(server.ranks[1], signal.SIGKILL)
        assert server.wait(5) != 0


PROGRAM = """
import json, sys
from functools import partial
from mpi4py import MPI
import mpillama.comm.mpi as mpi
from mpillama import LLM, GenerationParams, UserError
mpi.MPIWorld = partial(mpi.MPIWorld, hosts=sys.argv[3])
greedy = GenerationParams(max_tokens=12, temperature=0)
prompts = [f"Once upon a time {i}" for i in range(9)]
with LLM(sys.argv[1], threads=1, n_parallel=2, n_ctx=512, dp=int(sys.argv[2])) as llm:
    pieces = []
    for i, piece in enumerate(llm.stream("One day", greedy)):
        pieces.append(piece.text)
        if i == 3:
            texts = [completion.text for completion in llm.generate(prompts, greedy)]
    try:
        llm.generate(prompts + ["word " * 9999], greedy)
    except UserError:
        texts.append("refused")
    texts += ["".join(pieces), llm.embed(["one", "two", "three"]).shape]
everyone = MPI.COMM_WORLD.gather(texts)
if MPI.COMM_WORLD.rank == 0:
    assert all(own == texts for own in everyone)
    print(json.dumps(texts))
"""


def test_a_program_with_replicas():
    """Each of them a pipeline over two (pretended) hosts, whose steps in flight are not lost between two calls."""
    one = run([model(), 1, "a"], 1, program=("-c", PROGRAM))
    two = run([model(), 2, "abcd"], 4, program=("-c", PROGRAM))
    assert one.code == two.code == 0, one.err + two.err
    assert json.loads(two.out)[-2:] == json.loads(one.out)[-2:]
    assert sum(a != b for a, b in zip(json.loads(one.out), json.loads(two.out), strict=True)) <= 1


@pytest.mark.parametrize("command", [["generate", "-p", "Once"], ["logits", "--tokens", "1", "--out", "/dev/null"]])
def test_commands_with_one_answer_want_one_replica(command):
    ended = run([*command, "-m", model(), "--dp", 2], 2)
    assert ended.code == 2
    assert "mpillama batch and mpillama serve" in ended.err
