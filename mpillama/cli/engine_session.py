"""From a command line to an engine on rank 0, with all ranks behind it."""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpillama.chat import ChatTemplate, template_from
from mpillama.cli.files import read_text
from mpillama.cli.memory import least_context
from mpillama.cli.options import sampling_params
from mpillama.cli.progress import Log
from mpillama.cli.serving_options import n_sequences, template_kwargs
from mpillama.cli.session import Loaded, Model, load, open_header, open_model
from mpillama.comm.base import World, attempt, from_root, settle
from mpillama.engine.base import EngineLike
from mpillama.engine.embedding import pooling_type
from mpillama.engine.engine import Engine
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UserError
from mpillama.spmd import Interrupts
from mpillama.steps import Leader, follow
from mpillama.tokenizer import Tokenizer, load_tokenizer

# The KV cache that nobody has sized: room for so many tokens of each sequence, but not less than one whole context.
_TOKENS_PER_SEQUENCE = 4096


@dataclass(frozen=True)
class Service:
    """What a command needs on rank 0 to run requests.

    Attributes:
        loaded: the model.
        leader: of the ranks of rank 0's replica.
        engine: with this replica behind it.
        engines: where requests go: the engine, or those of all replicas.
        stop: lets all other ranks return from `Seat.follow`, with this exit code.
        tokenizer: of the model.
        template: chat template, None if there is neither one in the file nor a flag for one.
        metadata: of the file.
        name: of the model, for people and for clients.
        sampling: what the flags say; a request may say otherwise, also of all that follows.
    """

    loaded: Loaded
    leader: Leader
    engine: Engine
    engines: EngineLike
    stop: Callable[[int], None]
    tokenizer: Tokenizer
    template: ChatTemplate | None
    metadata: Mapping[str, Any]
    name: str
    sampling: SamplingParams
    ignore_eos: bool
    n_predict: int
    reasoning_budget: int
    template_kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class Prepared:
    """What rank 0 has made of the header."""

    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None
    metadata: Mapping[str, Any]


@dataclass(frozen=True)
class Seat:
    """What a rank does in a job that runs requests.

    Attributes:
        service: on rank 0, what runs requests.
        follow: on the others, does what rank 0 says until it says stop; returns the exit code that it gives.
    """

    service: Service | None
    follow: Callable[[], int]


def run_engine(
    args: Namespace,
    world: World,
    interrupts: Interrupts,
    log: Log,
    body: Callable[[Service], int],
    before: Callable[[], None] = lambda: None,
    check: Callable[[Prepared], None] = lambda prepared: None,
    replicas: bool = False,
) -> int:
    """Load the model on all ranks, run ``body`` on rank 0 with the others behind its engine; returns its exit code.

    ``before`` runs on rank 0 ahead of everything else, and ``check`` when the header has been read, so that a mistake
    that they find costs no loading. With ``replicas`` there may be several, of which ``body`` uses `Service.engines`.
    """

    seat = open_service(args, world, log, before, check, replicas)
    # What is there now stays to the end: no step has to wait while it is looked through for garbage.
    gc.freeze()
    interrupts.deferred = True
    if seat.service is None:
        return seat.follow()
    try:
        code = body(seat.service)
    except UserError as error:
        seat.service.stop(error.exit_code)
        error.told = True
        raise
    seat.service.stop(code)
    return code


def open_service(
    args: Namespace,
    world: World,
    log: Log,
    before: Callable[[], None] = lambda: None,
    check: Callable[[Prepared], None] = lambda prepared: None,
    replicas: bool = False,
) -> Seat:
    """Load the model on all ranks, with ``replicas`` perhaps several times; returns what this rank has to do.

    Raises:
        UserError: on rank 0, what is wrong; PeerFailure elsewhere.
    """

    def prepare() -> tuple[Model, Prepared]:
        before()
        model, prepared = _prepare(args, world.size)
        check(prepared)
        return model, prepared

    loaded, prepared = load(args, world, log, prepare, replicas)
    made: list[Service] = []

    def make() -> None:
        if prepared is not None:
            made.append(_service(args, world, loaded, prepared))

    from_root(world, make)

    def sit() -> Seat:
        return Seat(made[0] if made else None, _follower(args, world, loaded))

    return settle(world, attempt(sit)) if loaded.model.grid.dp > 1 else sit()


def _follower(args: Namespace, world: World, loaded: Loaded) -> Callable[[], int]:
    """Return what a rank does that is not rank 0: on the first rank of another replica, lead that."""
    team, runner = loaded.team, loaded.runner
    if world.rank == 0 or team.rank != 0:
        return lambda: follow(team, runner)
    # Here, because most ranks need none of it.
    from mpillama.openai.constraints import Grammars
    from mpillama.replicas import lead

    header = open_header(args, Path(loaded.model.paths[0]))
    tokenizer, leader = load_tokenizer(header.metadata), Leader(team, runner, loaded.model.grid.pp)
    engine = _engine(args, loaded, leader, tokenizer, header.metadata)
    grammars = Grammars(tokenizer, loaded.model.cfg.n_vocab)
    return lambda: lead(world, engine, leader, grammars)


def _prepare(args: Namespace, n_ranks: int) -> tuple[Model, Prepared]:
    header, model = open_model(args, n_ranks)
    if not args.ctx_size:
        n_kv = min(n_sequences(args) * model.n_ctx, max(model.n_ctx, n_sequences(args) * _TOKENS_PER_SEQUENCE))
        model = replace(model, n_kv=n_kv)
    model = replace(model, n_kv_min=least_context(args, model.n_kv))
    file = args.chat_template_file
    override = read_text(file, "--chat-template-file") if file else args.chat_template
    template = template_from(header.metadata, override)
    return model, Prepared(model, load_tokenizer(header.metadata), template, header.metadata)


def _engine(
    args: Namespace, loaded: Loaded, leader: Leader, tokenizer: Tokenizer, metadata: Mapping[str, Any]
) -> Engine:
    model = loaded.model
    return Engine(
        leader,
        tokenizer,
        model.cfg.n_vocab,
        model.n_ctx,
        loaded.runner.n_blocks,
        min(args.batch_size, args.ubatch_size),
        n_sequences(args),
        pooling=pooling_type(metadata),
    )


def _service(args: Namespace, world: World, loaded: Loaded, prepared: Prepared) -> Service:
    model, metadata, leader = loaded.model, prepared.metadata, Leader(loaded.team, loaded.runner, loaded.model.grid.pp)
    engine = _engine(args, loaded, leader, prepared.tokenizer, metadata)
    engines: EngineLike = engine
    stop: Callable[[int], None] = leader.stop
    if model.grid.dp > 1:
        from mpillama.replicas import Engines

        engines = all_engines = Engines(world, engine, [model.grid.replica(i)[0] for i in range(model.grid.dp)])

        def stop(exit_code: int) -> None:
            all_engines.stop(exit_code)
            leader.stop(exit_code)

    name = str(metadata.get("general.name") or Path(model.paths[0]).stem)
    return Service(
        loaded,
        leader,
        engine,
        engines,
        stop,
        prepared.tokenizer,
        prepared.template,
        metadata,
        name,
        sampling_params(args, metadata),
        args.ignore_eos,
        max(args.predict, -1),
        args.reasoning_budget,
        template_kwargs(args),
    )
