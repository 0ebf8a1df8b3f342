"""The flags that say how ranks share a model, but for the size of their shares; see `mpillama.grid`."""

from __future__ import annotations

from dataclasses import replace

from mpillama.cli import values
from mpillama.cli.options import Option

_GRID = (
    Option(
        ("-sm", "--split-mode"),
        "how the model is split over ranks: none (one rank only), layer = a pipeline stage for each rank, "
        "tensor = every weight over all ranks",
        values.choice("none", "layer", "tensor", later=("row",)),
        None,
        "{none,layer,tensor}",
        "LLAMA_ARG_SPLIT_MODE",
        shown="tensor inside a host, layer across hosts",
    ),
    Option(
        ("--tp",),
        "ranks that share every weight (tensor parallelism); neighbours",
        values.integer(1),
        None,
        shown="the ranks of a host",
    ),
    Option(
        ("--pp",),
        "stages that share the blocks (pipeline parallelism), of --tp ranks each",
        values.integer(1),
        None,
        shown="the number of hosts",
    ),
    Option(
        ("--dp",),
        "replicas of the model, of --tp x --pp ranks each, that share the requests of batch and serve",
        values.integer(1),
        None,
        shown="1",
    ),
    Option(
        ("--ep", "--expert-parallel"),
        "keep experts whole, each on one rank of a stage: on, off, auto = where a token waits less for them",
        values.choice("auto", "on", "off"),
        "auto",
        "{auto,on,off}",
    ),
)
GRID = tuple(replace(option, group="parallelism") for option in _GRID)
