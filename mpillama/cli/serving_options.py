"""Flags of the commands that run many requests: `serve` and `batch`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from mpillama.cli import values
from mpillama.cli.grid_options import GRID
from mpillama.cli.options import CONTEXT, LOGGING, MODEL, PROMPT, ROPE, SAMPLING, Option, sampling_params
from mpillama.cli.parallel_options import PARALLEL
from mpillama.errors import UsageError

DEFAULT_PARALLEL = 16

_SHOWN_CONTEXT = "what the model was trained with, and as many sequences of it as there is memory for"
_TEMPLATE = tuple(option for option in PROMPT if option.dest in ("jinja", "chat_template", "chat_template_file"))

REASONING = Option(
    ("--reasoning-budget",),
    "tokens that a model may think before it answers in a chat, -1 = no limit",
    values.integer(-1),
    -1,
    "N",
    "LLAMA_ARG_THINK_BUDGET",
    group="requests",
)

SERVING = (
    Option(
        ("-np", "--parallel"),
        f"sequences that are evaluated together (in each replica), 0 or -1 = {DEFAULT_PARALLEL}",
        values.integer(-1),
        -1,
        "N",
        "LLAMA_ARG_N_PARALLEL",
        group="requests",
    ),
    *(replace(option, shown=_SHOWN_CONTEXT) if option.dest == "ctx_size" else option for option in CONTEXT),
    REASONING,
    *(replace(option, group="requests") for option in _TEMPLATE),
)
"""The KV cache of ``-c`` tokens is shared by all sequences; one may have as many as all of them."""

_SHOWN_REPLICAS = "the number of hosts, if the model fits into each of them"
_GRID = (replace(option, shown=_SHOWN_REPLICAS) if option.dest == "dp" else option for option in GRID)

ENGINE = (*SERVING, *MODEL, *_GRID, *PARALLEL, *SAMPLING, *ROPE, *LOGGING)
"""All that `engine_session.run_engine` needs."""


def check_engine(namespace: Namespace) -> None:
    """Raise UsageError for flags of an engine that do not go together."""
    n_batch, n_parallel = min(namespace.batch_size, namespace.ubatch_size), n_sequences(namespace)
    if n_batch < n_parallel:
        raise UsageError(f"-np {n_parallel} sequences need as many tokens in a batch; raise -b and -ub, or lower -np")
    sampling_params(namespace)


def n_sequences(namespace: Namespace) -> int:
    """Return how many sequences are evaluated together: one where there is no flag for it."""
    parallel = getattr(namespace, "parallel", 1)
    return parallel if parallel > 0 else DEFAULT_PARALLEL
