"""Between the thread of the sockets and the main thread, where the engine runs.

The main thread takes requests and cancellations from a queue before each step and sleeps on that queue while there is
no work; what a step has brought goes to the event loop in one piece.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol, TypeVar

from starlette.requests import ClientDisconnect

from mpillama.engine.base import EngineLike, Stats
from mpillama.engine.request import Output, Request
from mpillama.errors import UserError
from mpillama.openai.call import Call
from mpillama.openai.errors import ApiError, bad
from mpillama.server.slots import Slots

# How long a signal may go unnoticed while there is no work.
_WAKE_SECONDS = 0.2

T = TypeVar("T")


class StopSignals(Protocol):
    """What tells the main thread to end; `spmd.Interrupts` is one."""

    exit_code: int
    time_is_short: bool


@dataclass(frozen=True)
class Errand:
    """Something else for the main thread to do between two steps, and where its outcome is waited for."""

    work: Callable[[], Any]
    outcome: asyncio.Future[Any]


@dataclass
class Totals:
    """Sums over all continuations that have ended, and over steps; written by the main thread."""

    prompt_seconds: float = 0.0
    decode_seconds: float = 0.0
    busy: int = 0
    longest: int = 0


class Ticket:
    """A call under way, on the side of the event loop.

    Attributes:
        call: the call.
        n_generated: tokens so far.
    """

    def __init__(self, bridge: Bridge, call: Call) -> None:
        self.call = call
        self.n_generated = 0
        self._bridge, self._closed = bridge, False
        self._open = {request.id for request in call.requests}
        self._events: asyncio.Queue[Output | ApiError] = asyncio.Queue()

    @property
    def running(self) -> bool:
        """Whether the engine still owes it something."""
        return bool(self._open)

    def put(self, event: Output | ApiError) -> None:
        """Take in what the engine says; nothing blocks here, and a request's length bounds how much there can be."""
        if isinstance(event, Output):
            self.n_generated += len(event.tokens)
            if event.last:
                self._open.discard(event.request_id)
        self._events.put_nowait(event)

    async def next(self) -> list[Output]:
        """Return the outputs that have come since the last time, at least one.

        Raises:
            ApiError: the engine has not taken the call, or has failed it.
            ClientDisconnect: it is closed.
        """
        # Before Python 3.12 `wait_for` loses a cancellation that meets the end of what it waits for.
        if self._closed:
            raise ClientDisconnect
        events = [await self._events.get()]
        while not self._events.empty():
            events.append(self._events.get_nowait())
        outputs = []
        for event in events:
            if isinstance(event, ApiError):
                raise event
            outputs.append(event)
        return outputs

    def close(self) -> None:
        """Forget the call; what of it still runs is cancelled."""
        self._closed = True
        self._bridge.forget(self, self._open)


class Bridge:
    """The link of one engine.

    Args:
        max_queue: requests that may wait, beyond those that run.

    Attributes:
        ready: whether the engine takes requests.
        draining: whether no more are taken.
        stats: of the engine after the last step.
        totals: of what it has done.
        n_places: sequences that can run at a time.
        tickets: calls under way, by request; only for the event loop.
        slots: likewise, once it is ready.
    """

    def __init__(self, max_queue: int) -> None:
        self.ready = self.draining = False
        self.stats = Stats()
        self.totals = Totals()
        self.tickets: dict[str, Ticket] = {}
        self.slots = Slots(0)
        self._errands: set[asyncio.Future[Any]] = set()
        self._max_queue = max_queue
        self.n_places = 1
        self._inbox: SimpleQueue[tuple[Request, ...] | str | Errand] = SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None

    # -- on the event loop -----------------------------------------------------------------------------------------

    def open(self) -> None:
        """Note the event loop, from which this is called."""
        self._loop = asyncio.get_running_loop()

    def check_room(self, n: int = 1) -> None:
        """Raise ApiError if ``n`` more requests cannot be taken."""
        if self.draining:
            raise _shutting_down()
        if not self.ready:
            raise ApiError(503, "the model is being loaded", code="loading")
        most = self._max_queue + self.n_places
        if n > most:
            raise bad(f"{n} prompts in one call are more than the server takes at all ({most}); send fewer at a time")
        if len(self.tickets) + n > most:
            raise ApiError(429, f"{len(self.tickets)} requests are waiting already; try again later", code="queue_full")

    def submit(self, call: Call) -> Ticket:
        """Pass a call's requests to the engine; raises ApiError if there is no room for them."""
        self.check_room(len(call.requests))
        self.slots.check(call.wanted_slot)
        ticket = Ticket(self, call)
        self.tickets |= dict.fromkeys((request.id for request in call.requests), ticket)
        for request in call.requests:
            self.slots.enter(request, call)
        self._inbox.put(call.requests)
        return ticket

    async def on_main(self, work: Callable[[], T]) -> T:
        """Let the main thread do something between two steps, and return what it returns.

        Raises:
            ApiError: what it raises, or the server ends before.
        """
        self.check_room(0)
        outcome: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._errands.add(outcome)
        outcome.add_done_callback(self._errands.discard)
        self._inbox.put(Errand(work, outcome))
        return await outcome

    def forget(self, ticket: Ticket, running: set[str]) -> None:
        """Drop a ticket, and tell the engine to drop what of it still runs."""
        for request in ticket.call.requests:
            self.slots.leave(request.id)
            if self.tickets.pop(request.id, None) and request.id in running:
                self._inbox.put(request.id)

    def _deliver(self, events: list[tuple[str, Output | ApiError]]) -> None:
        for request_id, event in events:
            ticket = self.tickets.get(request_id)
            if ticket is None:
                continue
            if isinstance(event, Output):
                if event.index == 0:
                    self.slots.add(request_id, event.tokens)
                if event.last:
                    self.slots.leave(request_id)
            ticket.put(event)

    def _refuse_all(self) -> None:
        # One that has ended may not have been taken note of yet.
        for ticket in {ticket for ticket in self.tickets.values() if ticket.running}:
            ticket.put(_shutting_down())
        for outcome in list(self._errands):
            _settle(outcome, _shutting_down())

    # -- on the main thread ----------------------------------------------------------------------------------------

    def run(self, engine: EngineLike, signals: StopSignals, grace: float, on_drain: Callable[[int], None]) -> None:
        """Serve until a signal comes, then for at most ``grace`` seconds until all that runs has ended."""
        deadline = float("inf")
        self.n_places = engine.n_places
        self.slots = Slots(engine.n_places)
        self.stats = engine.stats()
        self.ready = True
        while True:
            if (signals.exit_code or signals.time_is_short) and not self.draining:
                self.draining = True
                deadline = time.monotonic() + grace
                on_drain(self.stats.running + self.stats.waiting)
            events = self._take_in(engine, wait=not self.draining and not engine.has_work())
            if engine.has_work():
                events += self._step(engine)
            self.stats = engine.stats()
            self._send(events)
            if self.draining and (not engine.has_work() or time.monotonic() > deadline):
                break
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._refuse_all)

    def _send(self, events: list[tuple[str, Output | ApiError]]) -> None:
        if events:
            assert self._loop is not None
            self._loop.call_soon_threadsafe(self._deliver, events)

    def _take_in(self, engine: EngineLike, wait: bool) -> list[tuple[str, Output | ApiError]]:
        """Do what the event loop has asked for; with ``wait``, sleep until it asks for something."""
        events: list[tuple[str, Output | ApiError]] = []
        try:
            item = self._inbox.get(timeout=_WAKE_SECONDS) if wait else self._inbox.get_nowait()
            while True:
                if isinstance(item, str):
                    engine.cancel(item)
                elif isinstance(item, Errand):
                    self._run_errand(item)
                else:
                    events += self._add(engine, item)
                item = self._inbox.get_nowait()
        except Empty:
            return events

    def _run_errand(self, errand: Errand) -> None:
        outcome: Any
        try:
            outcome = errand.work()
        except ApiError as error:
            outcome = error
        assert self._loop is not None
        self._loop.call_soon_threadsafe(_settle, errand.outcome, outcome)

    def _add(self, engine: EngineLike, requests: tuple[Request, ...]) -> list[tuple[str, Output | ApiError]]:
        try:
            engine.add_all(requests)
        except UserError as error:
            return [(requests[0].id, bad(error.line))]
        return []

    def _step(self, engine: EngineLike) -> list[tuple[str, Output | ApiError]]:
        outputs = engine.step()
        totals = self.totals
        totals.busy += len(outputs)
        for output in outputs:
            if output.timings is not None:
                totals.prompt_seconds += output.timings.prompt
                totals.decode_seconds += output.timings.decode
            if output.usage is not None:
                totals.longest = max(totals.longest, output.usage.n_prompt + output.usage.n_generated)
        return [(output.request_id, output) for output in outputs]


def _shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def _settle(future: asyncio.Future[Any], outcome: Any) -> None:
    """Give a future what it waits for, unless its client has gone."""
    if future.done():
        return
    if isinstance(outcome, ApiError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
