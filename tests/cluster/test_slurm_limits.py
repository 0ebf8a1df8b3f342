"""What Slurm does to running jobs: the time limit strikes, a server is cancelled."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
from machines import MPILLAMA, ROOT, Slurm, until

LAUNCH = ROOT / "launch"
N_LINES, N_TOKENS = 600, 24

# Slurm looks at limits every 30 s only. The slowest way leaves work until then on any machine; the rest is done fast.
SLOW_AT_FIRST = f"""
if [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then how="--backend reference -np 1"; else how="-np 32"; fi
exec {MPILLAMA} "$@" $how
"""


def requests(path: Path) -> list[str]:
    """Write requests; returns their ids."""
    ids = [f"line-{i}" for i in range(N_LINES)]
    with path.open("w") as file:
        for i, name in enumerate(ids):
            body = {"prompt": f"Once upon a time {i}", "max_tokens": N_TOKENS, "seed": i, "ignore_eos": True}
            file.write(json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": body}) + "\n")
    return ids


def test_the_time_limit_strikes_and_every_line_is_answered_once(cluster: Slurm) -> None:
    program, out = cluster.folder / "slow.sh", cluster.folder / "limit.out"
    source, target = cluster.folder / "in.jsonl", cluster.folder / "out.jsonl"
    program.write_text(SLOW_AT_FIRST)
    ids = requests(source)
    # The signal comes 10 to 40 s after the start: 20 s before the end, or up to 30 s earlier.
    flags = ["-N2", "--ntasks-per-node=1", "-t1", "--signal=USR1@20", "-o", out]
    cluster.env["MPILLAMA"] = f"bash {program}"
    job = cluster.submit(*flags, LAUNCH / "slurm.sbatch", "batch", "-i", source, "-o", target, "--grace", "2", "-t", 1)
    cluster.env["MPILLAMA"] = MPILLAMA

    # A requeued job is held back for as long as credentials live: here 5 s.
    cluster.wait(job, "COMPLETED", 150.0)
    text = out.read_text()
    told = cluster.job(job)
    assert int(told["Restarts"]) >= 1
    assert "stopped by a signal: run the same command again for the rest" in text
    assert f"mpillama left work to do; requeueing job {job}" in text
    # The work of each run counts.
    runs = [int(n) for n in re.findall(r"mpillama batch: (\d+) answered", text)]
    assert len(runs) == int(told["Restarts"]) + 1
    assert min(runs) > 0
    assert sum(runs) == N_LINES
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(line["custom_id"] for line in lines) == sorted(ids)
    assert {line["response"]["status_code"] for line in lines} == {200}
    assert all(line["response"]["body"]["usage"]["completion_tokens"] == N_TOKENS for line in lines)


def test_a_server_answers_and_finishes_what_it_has_begun_when_it_is_cancelled(cluster: Slurm) -> None:
    out, key = cluster.folder / "serve.out", cluster.folder / "key"
    cluster.env["KEY_FILE"] = str(key)
    script = LAUNCH / "slurm-serve.sbatch"
    job = cluster.submit("-N2", "--ntasks-per-node=1", "-t5", "-o", out, script, "-t", 1, "-c", 4096)
    until("the line for the tunnel", lambda: out.exists() and "ssh -N -L" in out.read_text())
    port, node = re.search(r"ssh -N -L (\d+):(\w+):\1 ", out.read_text()).groups()  # type: ignore[union-attr]
    address = re.search(r"NodeAddr=(\S+)", cluster.run("scontrol", "show", "node", node).stdout)
    assert address
    headers = {"Authorization": f"Bearer {key.read_text().strip()}"}
    with httpx.Client(base_url=f"http://{address[1]}:{port}", headers=headers, timeout=30) as client:

        def healthy() -> bool:
            assert cluster.job(job)["JobState"] in ("PENDING", "RUNNING"), out.read_text()
            try:
                return client.get("/health").status_code == 200
            except httpx.ConnectError:
                return False

        until("health", healthy, 40.0)
        body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["usage"]["completion_tokens"] == 24
        assert httpx.post(f"{client.base_url}/v1/completions", json=body).status_code == 401

        long = {**body, "max_tokens": 600, "stream": True, "stream_options": {"include_usage": True}}
        with client.stream("POST", "/v1/completions", json=long) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert cluster.run("scancel", job).returncode == 0
            rest = [line.removeprefix("data: ") for line in lines if line]
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["usage"]["completion_tokens"] == 600
    cluster.wait(job, "CANCELLED")
    assert "stopping; 1 requests have 30 s to finish" in out.read_text()
