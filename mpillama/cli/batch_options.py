"""The flags of `mpillama batch`."""

from __future__ import annotations

from argparse import Namespace

from mpillama.batch.clock import parse_duration
from mpillama.cli import values
from mpillama.cli.checks import check_model
from mpillama.cli.options import Option
from mpillama.cli.serving_options import ENGINE, check_engine


def duration(text: str) -> float:
    """Parse a time; see `batch.clock.parse_duration`."""
    try:
        return parse_duration(text)
    except ValueError as error:
        raise values.BadValueError(str(error)) from None


BATCH = (
    Option(
        ("-i", "--input"),
        "requests: a line of JSON each, as OpenAI's batches have them (custom_id, method, url, body); - = stdin",
        values.path,
        None,
        "FNAME.jsonl",
        required=True,
        group="batch",
    ),
    Option(
        ("-o", "--output"),
        "results, appended as they are ready; what is answered there is not asked again",
        values.path,
        None,
        "FNAME.jsonl",
        required=True,
        group="batch",
    ),
    Option(
        ("--time-limit",),
        "stop in time before this, e.g. 90s, 1h30m or 11:30:00, and exit with 75 if work is left",
        duration,
        None,
        "TIME",
        group="batch",
        shown="what Slurm says is left",
    ),
    Option(
        ("--margin",),
        "how long before the time limit no request is begun any more",
        duration,
        None,
        "TIME",
        group="batch",
        shown="a twentieth of it, from 10 s to 2 min",
    ),
    Option(
        ("--grace",),
        "how long running requests may go on after that, or after SIGUSR1 or SIGTERM, before they are dropped",
        duration,
        15.0,
        "TIME",
        group="batch",
    ),
    *ENGINE,
)


def check_batch(namespace: Namespace) -> None:
    """Raise UsageError for flags of ``batch`` that do not go together."""
    check_engine(namespace)
    check_model(namespace)
