"""Ranks of one job on different devices, as a user starts them."""

import numpy as np

from gpu_host import needs_compiler
from job import run
from shared import shared
from tiny import nmse


@needs_compiler
def test_three_backends_in_one_job(tmp_path):
    golden = np.load(shared("golden", "qwen2moe-moe.npz"))
    tokens = ",".join(map(str, golden["tokens"].tolist()))
    flags = ["--tokens", tokens, "-ctk", "f32", "-ctv", "f32", "-ub", 10, "--out", tmp_path / "l.npy", "-v"]
    model = shared("golden", "qwen2moe-moe.gguf")
    ended = run(["logits", "-m", model, *flags, "--backend", "cpu,emulated,reference", "-ts", "5,2,1"], 3)
    assert ended.code == 0, ended.err
    assert "cpu, emulated and reference backends" in ended.err
    assert nmse(np.load(tmp_path / "l.npy"), golden["logits"]) <= 1e-6


def test_a_device_that_is_not_there_is_one_line(tmp_path):
    ended = run(["generate", "-p", "Once", "-n", 3, "-dev", "cpu,cuda:99"], 2)
    assert ended.code != 0
    # Launchers have something to say too.
    (line,) = [line for line in ended.err.splitlines() if "mpillama" in line]
    assert line.startswith("mpillama: error: rank 1 on ")


def test_list_devices():
    ended = run(["--list-devices"], 2)
    assert ended.code == 0
    assert ended.out.startswith("Available devices:\n  cpu: ")
