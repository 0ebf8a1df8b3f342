"""The loop of a batch job: keep the engine full, write each answer as it comes, and stop in time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any

from mpillama.batch.ids import IdSet
from mpillama.batch.requests import Line
from mpillama.batch.results import Results, key
from mpillama.engine.base import EngineLike
from mpillama.engine.request import Output
from mpillama.openai.calls import Call
from mpillama.openai.errors import ApiError, as_bad_request

# Requests that wait in the engine for each that runs, so that none of its places stays empty for a step.
_AHEAD = 2


class Hurry(Enum):
    """How much time there is."""

    NONE = "none"
    DRAIN = "finish what runs"
    NOW = "drop what runs"


@dataclass
class Summary:
    """What became of the lines.

    Attributes:
        answered: with a response.
        failed: with an error as the answer: bad lines, and requests that the model cannot take.
        skipped: answered by an earlier run.
        duplicates: of an id that had been read before.
        complete: whether every line has been read and answered.
        n_prompt: tokens.
        n_generated: tokens.
    """

    answered: int = 0
    failed: int = 0
    skipped: int = 0
    duplicates: int = 0
    complete: bool = False
    n_prompt: int = 0
    n_generated: int = 0


class Job:
    """Runs the lines of a file through an engine.

    Args:
        engine: without other work.
        make_call: turns a line's url and body into a call, or raises ApiError.
        lines: of the file of requests.
        results: where answers go; what it has already is not asked again.
        hurry: asked before each step.
        on_step: called after each step.
    """

    def __init__(
        self,
        engine: EngineLike,
        make_call: Callable[[str, dict[str, Any]], Call],
        lines: Iterable[Line],
        results: Results,
        hurry: Callable[[], Hurry] = lambda: Hurry.NONE,
        on_step: Callable[[Summary], None] = lambda summary: None,
    ) -> None:
        self._engine, self._make_call, self._results = engine, make_call, results
        self._lines, self._hurry, self._on_step = iter(lines), hurry, on_step
        self._read = IdSet()
        self._open: dict[str, tuple[Line, Call]] = {}
        self._requests: dict[str, str] = {}
        self.summary = Summary()

    def run(self) -> Summary:
        """Work until everything is answered or time is up; the results are on disk when it returns.

        Raises:
            UserError: the results cannot be written, or a rank has failed.
        """
        exhausted = False
        while (hurry := self._hurry()) is not Hurry.NOW:
            while not exhausted and hurry is Hurry.NONE and len(self._open) < _AHEAD * self._engine.n_places:
                line = next(self._lines, None)
                if line is None:
                    exhausted = True
                else:
                    self._take(line)
            if not self._open:
                break
            for output in self._engine.step():
                self._push(output)
            self._on_step(self.summary)
        for request_id in list(self._requests):
            self._engine.cancel(request_id)
        self.summary.complete = exhausted and not self._open
        self._results.sync()
        return self.summary

    def _take(self, line: Line) -> None:
        name = key(line.custom_id, line.result_id)
        if not self._read.add(name):
            self.summary.duplicates += 1
            return
        if name in self._results.answered:
            self.summary.skipped += 1
            return
        if line.body is None:
            self._refuse(line)
            return
        try:
            call = self._make_call(line.url, line.body)
            with as_bad_request():
                self._engine.add_all(call.requests)
        except ApiError as error:
            self._answer(line, error.status, error.body())
            return
        self._open[name] = (line, call)
        self._requests |= dict.fromkeys((request.id for request in call.requests), name)

    def _push(self, output: Output) -> None:
        name = self._requests[output.request_id]
        line, call = self._open[name]
        call.push(output)
        if output.last:
            del self._requests[output.request_id]
        if not call.done:
            return
        del self._open[name]
        try:
            response = call.response()
        except ApiError as error:
            self._answer(line, error.status, error.body())
            return
        self.summary.n_prompt += call.n_prompt
        self.summary.n_generated += call.n_generated
        self._answer(line, 200, response)

    def _answer(self, line: Line, status: int, body: dict[str, Any]) -> None:
        self.summary.answered += status == 200
        self.summary.failed += status != 200
        response = {"status_code": status, "request_id": line.result_id, "body": body}
        self._results.write(
            {"id": line.result_id, "custom_id": line.custom_id, "response": response, "error": None},
        )

    def _refuse(self, line: Line) -> None:
        """Answer a line that is no request."""
        self.summary.failed += 1
        error = {"code": "invalid_line", "message": f"line {line.number}: {line.error}"}
        self._results.write({"id": line.result_id, "custom_id": line.custom_id, "response": None, "error": error})
