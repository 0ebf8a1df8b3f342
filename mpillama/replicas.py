"""Many requests for several replicas of a model: rank 0 hands them out, and each replica runs its own.

A replica's first rank leads it: it has an engine of its own, with the rest of the replica behind it. Rank 0, which
leads the first replica, is the only one that reads requests and writes answers. What goes between it and the other
leaders are requests (or that one is cancelled) one way, and the outputs of a step the other way.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from heapq import heappop, heappush

from mpillama.comm.base import World
from mpillama.engine.base import EngineLike, Stats
from mpillama.engine.blocks import names_of
from mpillama.engine.engine import Engine
from mpillama.engine.request import Output, Request
from mpillama.errors import UserError
from mpillama.openai.constraints import AfterThought, GrammarConstraint, Grammars, Source
from mpillama.steps import Leader

# Seconds: how long rank 0, whose own replica is idle, waits for the others before it looks for new requests, and how
# long another leader sleeps at a time.
_PATIENCE, _SLEEP = 0.01, 1.0


@dataclass(frozen=True)
class Add:
    """A request for a replica.

    Attributes:
        request: without its constraint, which cannot travel.
        source: of the constraint.
        waited: seconds since it came in; the clocks of two hosts have nothing in common.
    """

    request: Request
    source: Source | None
    waited: float


@dataclass(frozen=True)
class Cancel:
    """A request that is not wanted any more."""

    request_id: str


@dataclass(frozen=True)
class Stop:
    """The replica's ranks are to return this exit code; its engine keeps what it has."""

    exit_code: int


@dataclass(frozen=True)
class Report:
    """What a replica has to say.

    Attributes:
        outputs: of its last step.
        stats: after it.
        stopped: whether it has stopped, as it was told.
        error: why it cannot go on, and the exit code.
    """

    outputs: list[Output]
    stats: Stats
    stopped: bool = False
    error: tuple[int, str] | None = None


@dataclass(eq=False)
class _Replica:
    """A replica as rank 0 sees it: the rank of its leader, continuations that are open there, and its last numbers."""

    leader: int
    load: int = 0
    stats: Stats = field(default_factory=Stats)


@dataclass(eq=False)
class _Open:
    """A request that has not ended: who has it, if anybody, and whether anybody still waits for it."""

    request: Request
    arrival: float
    replica: _Replica | None = None
    wanted: bool = True


class Engines(EngineLike):
    """The engines of all replicas as one; on rank 0.

    Requests wait here, in their order, until a replica has a place for them, so that replicas of different speed end at
    the same time. A request goes to the replica with the fewest open ones; or to the one that was the last to see the
    beginning of its prompt, if that has not so much more to do that computing it again would be better.

    Args:
        world: of all ranks.
        engine: of rank 0's own replica.
        leaders: the first rank of each replica.
        clock: seconds, never going back.
    """

    def __init__(
        self, world: World, engine: Engine, leaders: Sequence[int], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._world, self._engine, self._clock = world, engine, clock
        self.n_ctx, self.n_parallel = engine.n_ctx, engine.n_parallel
        self.n_places = engine.n_parallel * len(leaders)
        # More than run, or a place would be empty until rank 0 hears of it.
        self._most = engine.n_parallel + max(1, engine.n_parallel // 4)
        n_blocks = engine.stats().kv_blocks
        self._replicas = {rank: _Replica(rank, stats=Stats(kv_blocks=n_blocks)) for rank in leaders}
        self._open: dict[str, _Open] = {}
        self._waiting: list[tuple[float, int, _Open]] = []
        self._n_added = 0
        self._early: list[Output] = []
        # Which replica was the last to see a prompt's beginning, by the names of full KV blocks.
        self._seen: OrderedDict[bytes, _Replica] = OrderedDict()
        self._most_seen = len(leaders) * n_blocks

    # -- requests --------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Take a request in; raises UserError if it can never be run."""
        if request.id in self._open:
            raise UserError(f"there is a request {request.id} already; give each an id of its own")
        self._engine.check(request)
        entry = self._open[request.id] = _Open(request, self._clock())
        order = entry.arrival - request.params.priority * self._engine.priority_seconds
        self._n_added += 1
        heappush(self._waiting, (order, self._n_added, entry))

    def cancel(self, request_id: str) -> None:
        """Drop a request, if it is there."""
        entry = self._open.get(request_id)
        if entry is None or not entry.wanted:
            return
        entry.wanted = False
        if entry.replica is None:
            del self._open[request_id]
        elif entry.replica.leader == self._world.rank:
            self._take(self._engine.cancel(request_id))
        else:
            self._world.post(entry.replica.leader, Cancel(request_id))

    def has_work(self) -> bool:
        """Whether any request is open."""
        return bool(self._open)

    def stats(self) -> Stats:
        """Return the sums over the replicas, as far as they have told."""
        each = [replica.stats for replica in self._replicas.values() if replica.leader != self._world.rank]
        each.append(self._engine.stats())
        total = Stats(**{f.name: sum(getattr(stats, f.name) for stats in each) for f in fields(Stats)})
        total.waiting += sum(entry.request.params.n_branches for entry in self._open.values() if not entry.replica)
        return total

    # -- handing out -----------------------------------------------------------------------------------------------

    def _hand_out(self) -> list[Output]:
        """Give requests to replicas with room for them; returns what became at once of some."""
        outputs: list[Output] = []
        while self._waiting:
            entry = self._waiting[0][-1]
            if self._open.get(entry.request.id) is entry:
                least = min(self._replicas.values(), key=lambda replica: replica.load)
                if least.load >= self._most:
                    break
                outputs += self._give(entry, self._choose(entry.request, least))
            heappop(self._waiting)
        return outputs

    def _choose(self, request: Request, least: _Replica) -> _Replica:
        """Return the replica for a request, given the one with the least to do."""
        if not request.params.cache_prompt:
            return least
        names = names_of(request.prompt)
        chosen = least
        for n in range(len(names), 0, -1):
            home = self._seen.get(names[n - 1])
            if home is not None:
                known = n / len(names)
                if home.load < self._most and home.load - least.load <= known * self.n_parallel / 2:
                    chosen = home
                break
        for name in names:
            self._seen[name] = chosen
            self._seen.move_to_end(name)
        while len(self._seen) > self._most_seen:
            self._seen.popitem(last=False)
        return chosen

    def _give(self, entry: _Open, replica: _Replica) -> list[Output]:
        entry.replica = replica
        replica.load += entry.request.params.n_branches
        if replica.leader == self._world.rank:
            return _add(self._engine, replace(entry.request, arrival=entry.arrival))
        request, source = entry.request, None
        constraint = request.params.constraint
        if constraint is not None:
            if not isinstance(constraint, GrammarConstraint | AfterThought):
                raise AssertionError(f"a {type(constraint).__name__} cannot go to another rank")
            source = constraint.source
            request = replace(request, params=replace(request.params, constraint=None))
        self._world.post(replica.leader, Add(request, source, self._clock() - entry.arrival))
        return []

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Hand out what waits, run a step of rank 0's replica, and return what has come of all.

        Raises:
            UserError: a replica has failed.
        """
        outputs, self._early = self._early + self._hand_out(), []
        busy = self._engine.has_work()
        if busy:
            outputs += self._engine.step()
        outputs += self._collect(0.0 if busy or outputs else _PATIENCE)
        return self._take(outputs)

    def _take(self, outputs: list[Output]) -> list[Output]:
        """Take note of outputs, and return those that somebody waits for."""
        wanted = []
        for output in outputs:
            entry = self._open[output.request_id]
            if output.last:
                del self._open[output.request_id]
                if entry.replica is not None:
                    entry.replica.load -= entry.request.params.n_branches
            if entry.wanted:
                wanted.append(output)
        return wanted

    def _collect(self, seconds: float) -> list[Output]:
        outputs: list[Output] = []
        for rank, report in self._world.fetch(seconds):
            if report.error is not None:
                error = UserError(f"the replica of rank {rank} on {self._world.hosts[rank]}: {report.error[1]}")
                error.exit_code = report.error[0]
                raise error
            self._replicas[rank].stats = report.stats
            outputs += report.outputs
        return outputs

    def stop(self, exit_code: int = 0) -> None:
        """Let the other leaders return from `lead`, with what their engines have left; waits until they have."""
        running = {rank for rank in self._replicas if rank != self._world.rank}
        for rank in running:
            self._world.post(rank, Stop(exit_code))
        while running:
            for rank, report in self._world.fetch(_SLEEP):
                self._early += report.outputs
                if report.stopped:
                    running.discard(rank)


def lead(world: World, engine: Engine, leader: Leader, grammars: Grammars) -> int:
    """Run what rank 0 hands out, on the leader of another replica, until it says stop; returns the exit code it gives.

    Args:
        world: of all ranks.
        engine: of this replica.
        leader: of this replica's ranks.
        grammars: compiler of the constraints of requests.
    """
    outputs: list[Output] = []
    failed = False
    while True:
        works = engine.has_work() and not failed
        for _, order in world.fetch(0.0 if works else _SLEEP):
            if isinstance(order, Stop):
                if not failed:
                    engine.settle()
                leader.stop(order.exit_code)
                world.post(0, Report(outputs, engine.stats(), stopped=True))
                return order.exit_code
            if isinstance(order, Cancel):
                outputs += engine.cancel(order.request_id)
            else:
                outputs += _take(engine, order, grammars)
        if engine.has_work() and not failed:
            try:
                outputs += engine.step()
            except UserError as error:
                failed = True
                world.post(0, Report([], engine.stats(), error=(error.exit_code, error.line)))
        if outputs:
            world.post(0, Report(outputs, engine.stats()))
            outputs = []


def _take(engine: Engine, order: Add, grammars: Grammars) -> list[Output]:
    request = replace(order.request, arrival=time.monotonic() - order.waited)
    if order.source is not None:
        try:
            constraint = grammars.again(order.source)
        except UserError as error:
            return [_refusal(request, error)]
        request = replace(request, params=replace(request.params, constraint=constraint))
    return _add(engine, request)


def _add(engine: Engine, request: Request) -> list[Output]:
    try:
        engine.add(request)
    except UserError as error:
        return [_refusal(request, error)]
    return []


def _refusal(request: Request, error: UserError) -> Output:
    return Output(request.id, finish_reason="error", stop_reason=error.line, last=True)
