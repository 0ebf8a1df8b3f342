"""The flags of `mpillama plan`."""

from __future__ import annotations

import re
from argparse import Namespace
from dataclasses import replace

from mpillama.cli import values
from mpillama.cli.checks import check_model
from mpillama.cli.options import CONTEXT, LOGGING, MODEL, Option
from mpillama.cli.parallel_options import BACKEND, THREADS
from mpillama.errors import UsageError

_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def gibibytes(text: str) -> float:
    """Parse a size like 40G or 512M (powers of 1024); a bare number is in GiB."""
    match = _SIZE.fullmatch(text)
    if not match or not float(match[1]):
        raise values.BadValueError(f"expected a size like 40G, got {text!r}")
    return float(match[1]) * 1024.0 ** ("KMGT".index(match[2].upper() or "G") - 2)


def not_negative(text: str) -> float:
    """Parse a number of at least 0."""
    value = values.number(text)
    if value < 0:
        raise values.BadValueError(f"expected a number of at least 0, got {text!r}")
    return value


def _number(flag: str, help: str, metavar: str = "X", free: bool = False) -> Option:
    return Option((flag,), help, not_negative if free else values.positive, None, metavar, group="rates", shown="")


_CLUSTER = (
    Option(("--hosts",), "number of hosts", values.integer(1), None, group="cluster", shown="1"),
    Option(
        ("--gpus",),
        "GPUs in each host, with a rank for each",
        values.integer(1),
        None,
        excludes=("ranks_per_host",),
        group="cluster",
        shown="1",
    ),
    Option(
        ("--ranks-per-host",),
        "ranks in each host, of CPUs unless --device says otherwise",
        values.integer(1),
        None,
        group="cluster",
        shown="1",
    ),
    Option(
        ("--device",),
        "kind of device of a rank; a wrong name lists all",
        str,
        None,
        "NAME",
        group="cluster",
        shown="a100-40g with --gpus, else cpu",
    ),
    Option(
        ("--gpu-memory", "--memory"),
        "memory of each rank's device",
        gibibytes,
        None,
        "SIZE",
        group="cluster",
        shown="the device's",
        dest="memory",
    ),
    Option(("--within",), "link within a host", str, None, "NAME", group="cluster", shown="the device's"),
    Option(("--between",), "link between hosts", str, None, "NAME", group="cluster", shown="hdr"),
    Option(
        ("--cluster",),
        "file with all of this, as written by mpillama doctor --save; flags win over it",
        values.path,
        None,
        "FILE.toml",
        group="cluster",
    ),
    Option(
        ("--measure",),
        "measure the CPUs of this machine for some seconds, with as many ranks as --ranks-per-host",
        None,
        False,
        group="cluster",
    ),
    replace(
        THREADS,
        help="CPU threads per rank that --measure uses, 0 or -1 = the rank's share of its node",
        group="cluster",
    ),
    _number("--memory-gbps", "memory bandwidth of a device in GB/s that is reached"),
    _number("--matrix-tflops", "rate of a device's matrix products that is reached with quantized weights"),
    _number("--op-us", "microseconds of each op, however small", free=True),
    _number("--within-us", "latency within a host", free=True),
    _number("--within-gbps", "GB/s between two ranks of a host, each way"),
    _number("--between-us", "latency between hosts", free=True),
    _number("--between-gbps", "GB/s of a host to others, each way"),
)
_WORK = (
    Option(
        ("--shape",),
        "a published model without a file, e.g. llama-70b:Q4_K_M; a wrong name lists all",
        str,
        None,
        "NAME[:TYPE]",
        excludes=("model",),
        group="work",
    ),
    Option(("-p", "--n-prompt"), "tokens of a prompt", values.integer(1), 512, group="work"),
    Option(("-n", "--n-gen"), "tokens generated after it", values.integer(1), 128, group="work"),
    Option(("-np", "--parallel"), "sequences at once, in the whole cluster", values.integer(1), 1, group="work"),
    Option(
        ("--pipelined",),
        "let the stages of a pipeline work at the same time on different tokens; else they take turns",
        None,
        False,
        group="work",
    ),
)
_OUTPUT = (
    Option(("--json",), "print JSON, with all layouts", None, False, group="output"),
    Option(("--sbatch",), "write a Slurm job script of the best layout", values.path, None, "FILE", group="output"),
)
_CONTEXT = tuple(option for option in CONTEXT if option.dest != "batch_size")
PLAN = (*_CLUSTER, *_WORK, *_OUTPUT, *MODEL, *_CONTEXT, *BACKEND, *LOGGING)


def check_plan(namespace: Namespace) -> None:
    """Raise UsageError for flags that do not go together."""
    check_model(namespace)
    if namespace.shape and namespace.hf_repo:
        raise UsageError("--shape and --hf-repo exclude each other: give one of them")
    if namespace.measure and (namespace.gpus or namespace.device not in (None, "cpu")):
        raise UsageError("--measure measures the CPUs of this machine: give --ranks-per-host instead of --gpus")
