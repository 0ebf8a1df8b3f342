"""`mpillama batch`: answer a file of requests, however often the job has to be started for it."""

from __future__ import annotations

import os
import time
from argparse import Namespace

from tqdm import tqdm

from mpillama.batch.clock import default_margin, slurm_seconds_left
from mpillama.batch.job import Hurry, Job, Summary
from mpillama.batch.requests import Requests
from mpillama.batch.results import Results
from mpillama.cli.api_context import api_context
from mpillama.cli.engine_session import Service, run_engine
from mpillama.cli.progress import Log
from mpillama.comm.base import World
from mpillama.errors import UsageError
from mpillama.openai.calls import open_call
from mpillama.spmd import Interrupts

EXIT_UNFINISHED = os.EX_TEMPFAIL
"""75: there is work left, and the same command will do it; job scripts requeue on it."""

_LINE_SECONDS = 60.0


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    log = Log(args, world.rank)
    opened: list[tuple[Requests, Results, Deadline]] = []

    def before() -> None:
        if os.path.realpath(args.input) == os.path.realpath(args.output):
            raise UsageError("-i and -o name the same file; results need one of their own")
        requests = Requests(args.input)
        opened.append((requests, Results(args.output), Deadline(args, interrupts)))

    def body(service: Service) -> int:
        requests, results, deadline = opened[0]
        with results:
            return _work(args, service, requests, results, deadline, log)

    return run_engine(args, world, interrupts, log, body, before, replicas=True)


class Deadline:
    """When to stop: at the time limit, after a signal that announces it, or on Ctrl-C."""

    def __init__(self, args: Namespace, interrupts: Interrupts) -> None:
        self._interrupts, self._grace = interrupts, args.grace
        limit, now = args.time_limit, time.monotonic()
        if limit is None:
            limit = slurm_seconds_left(os.environ)
        self._last_start: float | None = None
        if limit is not None:
            margin = default_margin(limit) if args.margin is None else args.margin
            self._last_start = now + limit - max(margin, self._grace)
        self._draining: float | None = None
        self.reason = ""

    def hurry(self) -> Hurry:
        """Return how much time there is."""
        now = time.monotonic()
        if self._interrupts.exit_code == 130:
            self.reason = "stopped by Ctrl-C"
            return Hurry.NOW
        if self._draining is None:
            if self._interrupts.exit_code or self._interrupts.time_is_short:
                self.reason = "stopped by a signal"
            elif self._last_start is not None and now >= self._last_start:
                self.reason = "the time limit is near"
            else:
                return Hurry.NONE
            self._draining = now
        return Hurry.DRAIN if now < self._draining + self._grace else Hurry.NOW


def _work(args: Namespace, service: Service, requests: Requests, results: Results, deadline: Deadline, log: Log) -> int:
    if results.repaired:
        log.info(f"-o {args.output}: removed {results.repaired} bytes of a line that was not finished")
    context = api_context(service)
    with Progress(requests, args, log) as progress:
        job = Job(
            service.engines,
            lambda url, body: open_call(context, url, body),
            requests,
            results,
            deadline.hurry,
            progress.update,
        )
        summary = job.run()
    log.report(f"mpillama batch: {describe(summary, progress.seconds, deadline.reason)}")
    if summary.complete:
        return 0
    return 130 if deadline.reason == "stopped by Ctrl-C" else EXIT_UNFINISHED


def describe(summary: Summary, seconds: float, reason: str) -> str:
    """Return what became of the job, in one line."""
    tokens = summary.n_prompt + summary.n_generated
    parts = [
        f"{summary.answered} answered",
        f"{summary.failed} failed",
        f"{summary.skipped} answered earlier",
        *([f"{summary.duplicates} repeated"] if summary.duplicates else []),
        f"{summary.n_prompt} + {summary.n_generated} tokens in {seconds:.1f} s ({tokens / max(seconds, 1e-9):.1f} t/s)",
    ]
    end = "complete" if summary.complete else f"not complete, {reason}: run the same command again for the rest"
    return f"{', '.join(parts)}; {end}"


class Progress:
    """A bar on a terminal; elsewhere a line a minute. Both count the bytes of requests read."""

    def __init__(self, requests: Requests, args: Namespace, log: Log) -> None:
        self._requests, self._log = requests, log
        self._quiet = args.no_progress
        self._began = self._told = time.monotonic()
        self._bar = tqdm(
            total=requests.n_bytes or None,
            unit="B",
            unit_scale=True,
            desc="batch",
            disable=not log.interactive,
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    @property
    def seconds(self) -> float:
        """Since the first request."""
        return time.monotonic() - self._began

    def update(self, summary: Summary) -> None:
        """Show how far it is."""
        now = time.monotonic()
        rate = (summary.n_prompt + summary.n_generated) / max(now - self._began, 1e-9)
        if self._log.interactive:
            self._bar.set_postfix_str(f"{summary.answered} answered, {rate:.1f} t/s", refresh=False)
            self._bar.update(self._requests.bytes_read - self._bar.n)
        elif now - self._told >= _LINE_SECONDS:
            self._told = now
            line = f"{summary.answered} answered, {summary.failed} failed, {rate:.1f} t/s{self._eta(now)}"
            (self._log.verbose if self._quiet else self._log.report)(f"mpillama batch: {line}")

    def _eta(self, now: float) -> str:
        read, total = self._requests.bytes_read, self._requests.n_bytes
        if not total or not read:
            return ""
        left = (now - self._began) * (total - read) / read
        return f", {100 * read / total:.0f} % read, about {left / 60:.0f} min left"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
