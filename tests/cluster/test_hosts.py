"""mpirun over two hosts, each with its own name, network and shared memory, by launch/hostfile.sh."""

from __future__ import annotations

import json
import subprocess
import time

import numpy as np
import pytest
from machines import MPILLAMA, ROOT, Hosts, clean_environment

from shared import shared
from tiny import nmse

LAUNCH = [ROOT / "launch" / "hostfile.sh"]


def on_both(hosts: Hosts, *command: str) -> subprocess.CompletedProcess[str]:
    """Run mpillama with two ranks on each host, started on the first."""
    return hosts.on("hA", [*LAUNCH, hosts.file, 2, *MPILLAMA.split(), *command])


def test_text_over_two_hosts_is_that_of_one(hosts: Hosts) -> None:
    # Without --deterministic, words that are about as likely may change places.
    arguments = ["generate", "-p", "Once upon a time", "-n", "32", "--temp", "0", "-t", "1", "--deterministic"]
    alone = subprocess.run(
        [*MPILLAMA.split(), *arguments], capture_output=True, text=True, cwd=ROOT, env=clean_environment()
    )
    told = on_both(hosts, *arguments, "-v")
    assert told.returncode == 0, told.stderr
    assert "4 ranks on 2 hosts" in told.stderr
    assert told.stdout == alone.stdout
    assert len(alone.stdout.split()) > 20


@pytest.mark.parametrize(
    ("grid", "ranks"),
    [
        (["--pp", "2", "-ts", "5,2"], 1),
        (["--pp", "2", "--tp", "2", "-ts", "5,2,1,3", "--ep", "on"], 2),
        (["--tp", "4", "-ts", "5,2,1,1", "--ep", "off"], 2),
    ],
)
def test_logits_over_two_hosts_are_those_of_llama_cpp(hosts: Hosts, grid: list[str], ranks: int) -> None:
    golden, out = np.load(shared("golden", "llama-moe.npz")), hosts.folder / "logits.npy"
    tokens = ",".join(map(str, golden["tokens"].tolist()))
    flags = ["--tokens", tokens, "-ctk", "f32", "-ctv", "f32", "-ub", 10, "-t", 1, "--out", out]
    command = [*MPILLAMA.split(), "logits", "-m", shared("golden", "llama-moe.gguf"), *flags, *grid]
    told = hosts.on("hA", [*LAUNCH, hosts.file, ranks, *command])
    assert told.returncode == 0, told.stderr
    assert nmse(np.load(out), golden["logits"]) <= 1e-6


def test_doctor_over_two_hosts(hosts: Hosts) -> None:
    file = hosts.folder / "cluster.toml"
    told = on_both(hosts, "doctor", "--json", "--save", str(file), "--types", "Q8_0")
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert [rank["host"] for rank in found["ranks"]] == ["hA", "hA", "hB", "hB"]
    times = {(time["where"], time["what"], time["bytes"]): time["seconds"] for time in found["times"]}
    assert {where for where, _, _ in times} == {"within", "between"}
    assert all(seconds > 0 for seconds in times.values())
    assert times["between", "ping-pong", 4 << 20] > times["between", "ping-pong", 8]
    # What was measured is what plan takes.
    plan = hosts.on("hA", [*MPILLAMA.split(), "plan", "--shape", "llama-1b:Q8_0", "--cluster", file, "--json"])
    assert plan.returncode == 0, plan.stderr
    cluster = json.loads(plan.stdout)["cluster"]
    assert (cluster["hosts"], cluster["per_host"]) == (2, 2)
    assert cluster["between"]["latency_us"] == pytest.approx(1e6 * times["between", "ping-pong", 8], rel=1e-3)
    assert set(cluster["device"]["types"]) == {"Q8_0"}


def test_an_error_on_a_far_host_ends_the_job(hosts: Hosts) -> None:
    began = time.monotonic()
    told = on_both(hosts, "generate", "-m", str(hosts.folder / "none.gguf"))
    assert told.returncode != 0
    assert told.stderr.count("mpillama: error: ") == 1
    assert time.monotonic() - began < 20


def test_each_host_answers_requests_of_its_own(hosts: Hosts) -> None:
    """As the model fits into each of them, unless a flag says otherwise."""
    source, target = hosts.folder / "in.jsonl", hosts.folder / "out.jsonl"
    body = {"prompt": "Once upon a time", "max_tokens": 16, "temperature": 0}
    lines = [{"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body} for i in range(40)]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Matrix units, which round otherwise, take products of many tokens: two prompts are few.
    arguments = ["batch", "-i", str(source), "-o", str(target), "-c", "1024", "-np", "2", "-t", "1", "-v"]
    told = on_both(hosts, *arguments)
    assert told.returncode == 0, told.stderr
    assert "4 ranks on 2 hosts, 2 replicas of 2 ranks" in told.stderr
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {f"r{i}" for i in range(40)}
    assert len({answer["response"]["body"]["choices"][0]["text"] for answer in answers}) == 1
    told = on_both(hosts, *arguments, "--dp", "1")
    assert "2 stages of 2 ranks" in told.stderr
    assert "40 answered earlier" in told.stderr
