"""How long the job may run: what the user says, or what the batch system says."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Callable, Mapping

_UNITS = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
_CLOCK = re.compile(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d\d)")


def parse_duration(text: str) -> float:
    """Return seconds of ``90`` (seconds), ``90s``, ``1h30m``, ``MM:SS``, ``HH:MM:SS`` or ``D-HH:MM:SS``.

    Raises:
        ValueError: it is none of these.
    """
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    if text and (match := _UNITS.fullmatch(text)):
        return float(sum(int(n) * unit for n, unit in zip(match.groups("0"), (86400, 3600, 60, 1), strict=True)))
    if match := _CLOCK.fullmatch(text):
        days, hours, minutes, seconds = (int(part) for part in match.groups("0"))
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    raise ValueError(f"expected a time like 90s, 1h30m or 11:30:00, got {text!r}")


def slurm_seconds_left(environ: Mapping[str, str], now: Callable[[], float] = time.time) -> float | None:
    """Return the seconds until Slurm ends this job; None outside Slurm, or if the job has no limit."""
    end = environ.get("SLURM_JOB_END_TIME", "")
    if end.isdigit():
        return float(end) - now()
    job = environ.get("SLURM_JOB_ID", "")
    if not job:
        return None
    try:
        said = subprocess.run(
            ["squeue", "--noheader", "--jobs", job, "--format", "%L"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()
        return parse_duration(said)
    except (OSError, subprocess.SubprocessError, ValueError):
        # No squeue on this node, a controller that is away, "UNLIMITED": then the signal before the end must do.
        return None


def default_margin(seconds: float) -> float:
    """Return how long before the end to stop, where nobody says: a twentieth of the time, between 10 s and 2 min."""
    return min(120.0, max(10.0, seconds / 20))
