"""Clusters on one machine, for the time of a test: a Slurm of two nodes, and two hosts with a network of their own.

Both need root. The Slurm is the distribution's (slurmctld, slurmd, munged), on ports of its own, without systemd; its
nodes are two daemons on this host, each with a /dev/shm of its own. The hosts are namespaces: each has its own name,
network and /dev/shm, and a veth pair joins them; a look-alike of ssh starts processes there.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MPILLAMA = f"{sys.executable} -m mpillama"


def need(*programs: str) -> None:
    """Skip the test unless this is root and there are these programs."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to start daemons and make namespaces")
    missing = [name for name in programs if shutil.which(name, path=_path()) is None]
    if missing:
        pytest.skip(f"there is no {', '.join(missing)}; apt-get install slurm-wlm munge iproute2 util-linux")


def mpirun() -> str:
    """Return the launcher of this environment."""
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        pytest.skip("there is no mpirun; pip install mpich provides one")
    return found


def is_open_mpi() -> bool:
    """Whether the launcher is Open MPI's."""
    told = subprocess.run([mpirun(), "--version"], capture_output=True, text=True).stdout
    return any(word in told for word in ("Open MPI", "OpenRTE", "PRRTE"))


def until(what: str, ready: Callable[[], object], limit: float = 20.0) -> None:
    """Wait for something; fails the test if it does not come."""
    began = time.monotonic()
    while not ready():
        if time.monotonic() - began > limit:
            pytest.fail(f"{what}: not within {limit} s")
        time.sleep(0.05)


def _path() -> str:
    return os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


def clean_environment() -> dict[str, str]:
    """Return this environment without what launchers and batch systems have put there."""
    prefixes = ("SLURM", "PMI", "OMPI_COMM", "HYD", "LLAMA_ARG_", "PRTE_MCA_rmaps")
    return {**{k: v for k, v in os.environ.items() if not k.startswith(prefixes)}, "PATH": _path()}


# -- Slurm -------------------------------------------------------------------------------------------------------------

_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
InactiveLimit=0
KillWait=20
MessageTimeout=20
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port1} CPUs=4 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={port2} CPUs=4 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""


@dataclass
class Slurm:
    """A Slurm that runs; ``env`` is the environment of its commands."""

    folder: Path
    env: dict[str, str]

    def run(self, *command: object, limit: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run one of its commands."""
        words = [str(word) for word in command]
        return subprocess.run(
            words, env=self.env, capture_output=True, text=True, timeout=limit, cwd=ROOT, stdin=subprocess.DEVNULL
        )

    def submit(self, *arguments: object) -> str:
        """Submit a job and return its id."""
        told = self.run("sbatch", "--parsable", *arguments)
        assert told.returncode == 0, told.stderr
        return told.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """Return what Slurm knows of a job."""
        words = self.run("scontrol", "show", "job", number).stdout.split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, state: str, limit: float = 45.0) -> dict[str, str]:
        """Wait until a job is in a state."""
        until(f"job {number} {state}", lambda: self.job(number).get("JobState") == state, limit)
        return self.job(number)


@contextmanager
def slurm() -> Iterator[Slurm]:
    """Start a Slurm of two nodes, and end it."""
    need("slurmctld", "slurmd", "sbatch", "srun", "munged", "unshare")
    # Not below pytest's folder: the path of a socket has room for about 100 characters.
    folder = Path(tempfile.mkdtemp(prefix="mpillama-slurm-"))
    pids: list[Path] = [folder / "munge" / "pid", folder / "slurmctld.pid"]
    pids += [folder / f"slurmd.{node}.pid" for node in ("n1", "n2")]
    conf = folder / "slurm.conf"
    env = {**clean_environment(), "SLURM_CONF": str(conf)}
    try:
        _start_slurm(folder, conf, env)
        made = Slurm(folder, env)
        try:
            until("two idle nodes", lambda: made.run("sinfo", "-h", "-t", "idle", "-o", "%D").stdout.strip() == "2")
        except pytest.fail.Exception:
            logs = "\n".join(log.read_text()[-800:] for log in folder.glob("*.log"))
            pytest.fail(f"Slurm does not come up: {logs}")
        try:
            yield made
        finally:
            # A daemon that goes first leaves its jobs behind.
            made.run("scancel", "--user=root")
            until("the end of all jobs", lambda: not made.run("squeue", "--noheader").stdout.strip(), 40.0)
    finally:
        for file in reversed(pids):
            with suppress(OSError, ValueError):
                os.kill(int(file.read_text()), 15)
        time.sleep(0.3)
        shutil.rmtree(folder, ignore_errors=True)


def _start_slurm(folder: Path, conf: Path, env: dict[str, str]) -> None:
    ports = _free_ports(3)
    (folder / "munge").mkdir(mode=0o700)
    (folder / "state").mkdir()
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    conf.write_text(_CONF.format(host=host, folder=folder, port=ports[0], port1=ports[1], port2=ports[2]))
    munge = [f"--{name}={folder}/munge/{file}" for name, file in _MUNGE_FILES]
    for command in (
        ["munged", "--force", *munge],
        ["slurmctld", "-f", str(conf)],
        *(["unshare", "--mount", "bash", "-c", _OWN_SHM, "slurmd", node, str(conf)] for node in ("n1", "n2")),
    ):
        # Daemons keep what they inherit open: pipes would never end.
        with (folder / "start.log").open("ab") as log:
            code = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log).returncode
        if code:
            pytest.fail(f"{' '.join(command)} does not start: {(folder / 'start.log').read_text()[-500:]}")


# MPICH's libraries on two nodes that share a /dev/shm take each other's files for their own at times.
_OWN_SHM = 'mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && exec slurmd -N "$1" -f "$2"'
_MUNGE_FILES = (
    ("key-file", "key"),
    ("socket", "sock"),
    ("pid-file", "pid"),
    ("log-file", "log"),
    ("seed-file", "seed"),
)


def _free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [opened.getsockname()[1] for opened in sockets]
    for opened in sockets:
        opened.close()
    return ports


# -- hosts -------------------------------------------------------------------------------------------------------------

_SSH = """#!/bin/bash
# The part of ssh that launchers use: flags, a host, a command.
while [[ $1 == -* ]]; do case $1 in -l | -p | -o | -F) shift 2 ;; *) shift ;; esac; done
host=${1#*@}
shift
exec nsenter -t "$(cat "$HOSTS_DIR/$host.pid")" -n -u -m -i -- /bin/bash -c "cd '$PWD' 2>/dev/null; $*"
"""
HOSTS = ("hA", "hB")


@dataclass(frozen=True)
class Job:
    """A job that runs, and what it has written so far."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path


@dataclass
class Hosts:
    """Two hosts that run; ``file`` names them for launchers."""

    folder: Path
    env: dict[str, str]
    file: Path

    def on(self, host: str, command: Sequence[object], limit: float = 60.0) -> subprocess.CompletedProcess[str]:
        """Run a command on a host."""
        return subprocess.run(
            [*self._enter(host), f"--wd={ROOT}", "--", *map(str, command)],
            env=self.env,
            capture_output=True,
            text=True,
            timeout=limit,
            stdin=subprocess.DEVNULL,
        )

    @contextmanager
    def started(self, host: str, command: Sequence[object]) -> Iterator[Job]:
        """Start a command on a host; what is left of it at the end, on both hosts, is killed."""
        before = {pid for name in HOSTS for pid in self.processes(name)}
        out, err = self.folder / "job.out", self.folder / "job.err"
        with out.open("wb") as file, err.open("wb") as errors:
            words = [*self._enter(host), f"--wd={ROOT}", "--", *map(str, command)]
            running = subprocess.Popen(words, env=self.env, stdin=subprocess.DEVNULL, stdout=file, stderr=errors)
        try:
            yield Job(running, out, err)
        finally:
            for pid in {pid for name in HOSTS for pid in self.processes(name)} - before:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            running.wait()

    def processes(self, host: str, command: str = "") -> list[int]:
        """Return the processes on a host whose command line begins so, the oldest first."""
        holder = (self.folder / f"{host}.pid").read_text().strip()
        network = os.stat(f"/proc/{holder}/ns/net").st_ino
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            # Whatever ends meanwhile is on no host.
            with suppress(OSError):
                here = os.stat(folder / "ns" / "net").st_ino == network
                words = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                if here and words.startswith(command):
                    found.append(int(folder.name))
        return sorted(found)

    def link(self, state: str) -> None:
        """Take the network between the hosts ``down``, or bring it ``up``."""
        told = self.on("hA", ["ip", "link", "set", "eth0", state])
        assert told.returncode == 0, told.stderr

    def _enter(self, host: str) -> list[str]:
        return ["nsenter", "-t", (self.folder / f"{host}.pid").read_text().strip(), "-n", "-u", "-m", "-i"]


@contextmanager
def two_hosts() -> Iterator[Hosts]:
    """Make two hosts, and end them."""
    need("unshare", "nsenter", "ip")
    folder = Path(tempfile.mkdtemp(prefix="mpillama-hosts-"))
    (folder / "hosts").write_text("127.0.0.1 localhost\n10.77.0.1 hA\n10.77.0.2 hB\n")
    ssh = folder / "ssh"
    ssh.write_text(_SSH)
    ssh.chmod(0o755)
    file = folder / "hosts.txt"
    file.write_text("# the hosts of this test\nhA\n\nhB\n")
    env = clean_environment()
    env |= {"HOSTS_DIR": str(folder), "HYDRA_LAUNCHER": "ssh", "HYDRA_LAUNCHER_EXEC": str(ssh), "MPIRUN": mpirun()}
    # Open MPI 5's name for the same; as root it asks twice whether that is meant.
    env |= {"PRTE_MCA_plm_ssh_agent": str(ssh), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    holders = []
    try:
        for name in HOSTS:
            setup = (
                f"hostname {name}; mount --make-rprivate /; mount --bind {folder}/hosts /etc/hosts;"
                f" mount -t tmpfs tmpfs /dev/shm; echo $$ > {folder}/{name}.pid; exec sleep infinity"
            )
            unshare = ["unshare", "--net", "--uts", "--mount", "--ipc", "--fork", "--kill-child", "bash", "-c", setup]
            quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            holders.append(subprocess.Popen(unshare, env=env, **quiet))  # type: ignore[call-overload]
        _connect(folder, holders, env)
        yield Hosts(folder, env, file)
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _connect(folder: Path, holders: list[subprocess.Popen[bytes]], env: dict[str, str]) -> None:
    """Join the hosts by a pair of virtual network cards, and wait until they are up."""

    def started() -> bool:
        if any(holder.poll() is not None for holder in holders):
            pytest.skip("namespaces are not allowed here")
        return all((folder / f"{name}.pid").exists() and (folder / f"{name}.pid").read_text().strip() for name in HOSTS)

    until("two hosts", started)
    a, b = ((folder / f"{name}.pid").read_text().strip() for name in HOSTS)

    def ip(*words: str, pid: str = "") -> str:
        command = ["nsenter", "-t", pid, "-n", "ip", *words] if pid else ["ip", *words]
        told = subprocess.run(command, env=env, capture_output=True, text=True)
        if told.returncode:
            pytest.skip(f"no virtual network here: {' '.join(command)}: {told.stderr.strip()}")
        return told.stdout

    ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
    for pid, address in ((a, "10.77.0.1/24"), (b, "10.77.0.2/24")):
        ip("addr", "add", address, "dev", "eth0", pid=pid)
        for card in ("lo", "eth0"):
            ip("link", "set", card, "up", pid=pid)
    until("the network", lambda: all("state UP" in ip("link", "show", "eth0", pid=pid) for pid in (a, b)))
