"""The flags that say what each rank computes on, with which share of the model, and how the model gets there."""

from __future__ import annotations

from dataclasses import replace

from mpillama.backends import NAMES as BACKENDS
from mpillama.cli import values
from mpillama.cli.options import Option


def _parallelism(*options: Option) -> tuple[Option, ...]:
    return tuple(replace(option, group="parallelism") for option in options)


TENSOR_SPLIT = _parallelism(
    Option(
        ("-ts", "--tensor-split"),
        "share of the model of each rank, e.g. 3,1; auto = by measured speed, memory = by free memory",
        values.shares,
        None,
        "{N0,N1,N2,...|auto|memory}",
        "LLAMA_ARG_TENSOR_SPLIT",
        shown="equal shares",
    ),
)

BACKEND = _parallelism(
    Option(
        ("--backend",),
        "what computes: cpu (native kernels), cuda or hip (GPU, through CuPy), reference (NumPy), emulated (GPU "
        "kernels on the CPU, for tests), auto = cpu where it was built; or a list, as for --device",
        values.list_of(values.choice(*BACKENDS)),
        "auto",
        "{" + ",".join(BACKENDS) + "}[,...]",
    ),
)

DEVICE = _parallelism(
    Option(
        ("-dev", "--device"),
        "devices of the ranks: cpu (or none), cuda:0, hip:0, …; one for each rank of the job, or fewer: one for each "
        "rank of a host, the same on all hosts and repeated where a host has more ranks; see --list-devices",
        values.list_of(values.device),
        None,
        "DEV1,DEV2,...",
        "LLAMA_ARG_DEVICE",
        excludes=("backend",),
        shown="as --backend says",
    ),
)

COLLECTIVES = _parallelism(
    Option(
        ("--collectives",),
        "how GPUs add up: auto = NCCL (RCCL) where every rank has it, else by way of the host; host; mpi = an MPI "
        "library that takes addresses of GPU memory",
        values.choice("auto", "host", "mpi"),
        "auto",
        "{auto,host,mpi}",
        "MPILLAMA_COLLECTIVES",
    ),
    Option(
        ("--wire",),
        "type in which NCCL sends and adds up what ranks have computed; 16 bits are half the traffic, less exact",
        values.choice("f32", "bf16", "f16"),
        "f32",
        "{f32,bf16,f16}",
        "MPILLAMA_WIRE",
    ),
)

TIMEOUT = _parallelism(
    Option(
        ("--timeout", "--rank-timeout"),
        "end the job when a rank keeps the others waiting this long inside a step, 0 = never",
        values.seconds,
        60.0,
        "SECONDS",
        dest="rank_timeout",
    ),
)

THREADS = Option(
    ("-t", "--threads"),
    "CPU threads per rank, 0 or -1 = the rank's share of its node",
    values.integer(-1),
    -1,
    env="LLAMA_ARG_THREADS",
    group="parallelism",
)

LOAD = _parallelism(
    Option(
        ("--load",),
        "how the weights get to the ranks: direct = each reads its own slices, bcast = each byte is read once and sent "
        "to whom it belongs, auto = bcast for ranks on several hosts and a file on a network file system",
        values.choice("auto", "direct", "bcast"),
        "auto",
        "{auto,direct,bcast}",
    ),
)

FIT = (
    Option(
        ("-fit", "--fit"),
        "whether a context that the memory does not hold is made smaller; on also does so with one that -c asks for",
        values.choice("on", "off"),
        None,
        "{on,off}",
        "LLAMA_ARG_FIT",
        shown="on, unless -c is given",
        group="context",
    ),
    Option(
        ("-fitc", "--fit-ctx"),
        "context that --fit goes down to at most",
        values.integer(1),
        4096,
        env="LLAMA_ARG_FIT_CTX",
        group="context",
    ),
)

PARALLEL = (
    THREADS,
    *BACKEND,
    *DEVICE,
    *TENSOR_SPLIT,
    *LOAD,
    *FIT,
    *COLLECTIVES,
    *TIMEOUT,
    *_parallelism(
        Option(
            ("--deterministic",),
            "compute the same numbers on any number of ranks up to 12, at a price in speed",
            None,
            False,
        ),
    ),
)
