"""The flags of a prompt cache."""

from __future__ import annotations

from mpillama.cli import values
from mpillama.cli.options import Option

PROMPT_CACHE = (
    Option(
        ("--prompt-cache",),
        "file to keep the KV of prompt and answer in, for the next run that begins alike, on any number of ranks",
        values.path,
        None,
        "FNAME",
        group="prompt cache",
    ),
    Option(("--prompt-cache-ro",), "use the prompt cache, but do not change it", None, False, group="prompt cache"),
)
