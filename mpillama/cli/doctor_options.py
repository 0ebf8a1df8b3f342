"""The flags of `mpillama doctor`."""

from __future__ import annotations

from dataclasses import replace

from mpillama.cli import values
from mpillama.cli.options import LOGGING, Option
from mpillama.cli.parallel_options import BACKEND, DEVICE, THREADS, TIMEOUT

DOCTOR = (
    Option(
        ("-m", "--model"),
        "also look at this model file, and read a part of it",
        values.path,
        None,
        "FNAME",
        group="doctor",
    ),
    Option(("--json",), "print JSON, with the facts of each rank", None, False, group="doctor"),
    Option(("--quick",), "time no messages between ranks", None, False, group="doctor"),
    Option(
        ("--save",),
        "measure CPUs and links for some seconds, and write a file for mpillama plan --cluster",
        values.path,
        None,
        "FILE.toml",
        group="doctor",
    ),
    Option(
        ("--types",),
        "tensor types whose products --save measures",
        lambda text: tuple(text.upper().split(",")),
        None,
        "TYPE,...",
        shown="Q4_K,Q6_K,Q8_0",
        group="doctor",
    ),
    replace(
        THREADS,
        help="CPU threads per rank that --save measures with, 0 or -1 = the rank's share of its node",
        group="doctor",
    ),
    *BACKEND,
    *DEVICE,
    *TIMEOUT,
    *LOGGING,
)
