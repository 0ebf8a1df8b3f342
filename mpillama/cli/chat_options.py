"""The flags of `mpillama chat`."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace

from mpillama.cli.checks import check_model, check_split
from mpillama.cli.grid_options import GRID
from mpillama.cli.options import CONTEXT, LOGGING, MODEL, PROMPT, ROPE, SAMPLING, Option, sampling_params
from mpillama.cli.parallel_options import PARALLEL
from mpillama.cli.prompt_cache_options import PROMPT_CACHE
from mpillama.cli.serving_options import REASONING
from mpillama.errors import UsageError

# A chat streams what the model says, without special tokens and without repeating what was typed.
_PROMPT = tuple(option for option in PROMPT if option.dest not in ("special", "display_prompt"))
_HELP = {"prompt": "the first message", "file": "file with the first message", "predict": "tokens of an answer at most"}

CHAT = (
    *(replace(option, help=_HELP.get(option.dest, option.help), group="chat") for option in _PROMPT),
    Option(("-st", "--single-turn"), "leave after the first answer", None, False, group="chat"),
    *(replace(option, group="chat") for option in REASONING),
    *CONTEXT,
    *PROMPT_CACHE,
    *MODEL,
    *GRID,
    *PARALLEL,
    *SAMPLING,
    *ROPE,
    *LOGGING,
)


def check_chat(namespace: Namespace) -> None:
    """Raise UsageError for flags of ``chat`` that do not go together."""
    check_model(namespace)
    check_split(namespace)
    if namespace.predict == 0:
        raise UsageError("-n 0 leaves no room for an answer: give a number of tokens, or -1 for no limit")
    sampling_params(namespace)
