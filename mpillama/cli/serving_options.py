"""Flags of the commands that run many requests: `serve` and `batch`."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from typing import Any

from mpillama.cli import values
from mpillama.cli.grid_options import GRID
from mpillama.cli.options import CONTEXT, LOGGING, MODEL, PROMPT, ROPE, SAMPLING, Option, sampling_params
from mpillama.cli.parallel_options import PARALLEL
from mpillama.errors import UsageError

DEFAULT_PARALLEL = 16

_SHOWN_CONTEXT = "what the model was trained with, and as many sequences of it as there is memory for"
_TEMPLATE = tuple(option for option in PROMPT if option.dest in ("chat_template", "chat_template_file"))


def template_variables(text: str) -> dict[str, Any]:
    """Parse a JSON object of variables for a chat template."""
    # Not at the top: it needs what help does not.
    from mpillama.chat import RESERVED

    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise values.BadValueError(f'expected a JSON object like {{"key": "value"}}, got {text!r}')
    if RESERVED & set(found):
        raise values.BadValueError(f"{sorted(RESERVED & set(found))[0]} is not for you to set")
    return found


def switch(text: str) -> str:
    """Parse ``on``, ``off`` or ``auto``, also in the other words that llama.cpp takes."""
    if text == "auto":
        return text
    try:
        return "on" if values.boolean(text) else "off"
    except values.BadValueError:
        raise values.BadValueError(f"expected on, off or auto, got {text!r}") from None


REASONING = (
    Option(
        ("-rea", "--reasoning"),
        "whether a model thinks before it answers in a chat, if its template has enable_thinking for this",
        switch,
        "auto",
        "on|off|auto",
        "LLAMA_ARG_REASONING",
    ),
    Option(
        ("--reasoning-effort",),
        "how much it thinks, in a word that its template knows, like low, medium or high",
        str,
        "default",
        "LEVEL",
        "LLAMA_ARG_REASONING_EFFORT",
        shown="the template's",
    ),
    Option(
        ("--reasoning-budget",),
        "tokens that a model may think before it answers in a chat, -1 = no limit",
        values.integer(-1),
        -1,
        "N",
        "LLAMA_ARG_THINK_BUDGET",
    ),
    Option(
        ("--chat-template-kwargs",),
        "variables of the chat template, as a JSON object",
        template_variables,
        None,
        "JSON",
        "LLAMA_ARG_CHAT_TEMPLATE_KWARGS",
    ),
)


def template_kwargs(namespace: Namespace) -> dict[str, Any]:
    """Return the variables that a chat template gets by the flags of `REASONING`."""
    found = dict(namespace.chat_template_kwargs or {})
    if namespace.reasoning != "auto":
        found["enable_thinking"] = namespace.reasoning == "on"
    if namespace.reasoning_effort == "none":
        found["enable_thinking"] = False
    elif namespace.reasoning_effort != "default":
        found["reasoning_effort"] = namespace.reasoning_effort
    return found


_HELP = "tokens of an answer at most where a request sets no limit, -1 = no limit"
_PREDICT = next(option for option in PROMPT if option.dest == "predict")

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
    replace(_PREDICT, help=_HELP, parse=values.integer(-1), group="requests"),
    *(replace(option, group="requests") for option in (*REASONING, *_TEMPLATE)),
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
    if namespace.predict == 0:
        raise UsageError("-n 0 leaves no room for answers: give a number of tokens, or -1 for no limit")
    sampling_params(namespace)


def n_sequences(namespace: Namespace) -> int:
    """Return how many sequences are evaluated together: one where there is no flag for it."""
    parallel = getattr(namespace, "parallel", 1)
    return parallel if parallel > 0 else DEFAULT_PARALLEL
