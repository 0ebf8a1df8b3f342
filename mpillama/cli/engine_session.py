"""From a command line to an engine on rank 0, with all ranks behind it."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpillama.chat import ChatTemplate, template_from
from mpillama.cli.files import read_text
from mpillama.cli.options import sampling_params
from mpillama.cli.progress import Log
from mpillama.cli.serving_options import n_sequences
from mpillama.cli.session import Loaded, Model, load, open_model
from mpillama.comm.base import World, from_root
from mpillama.engine.embedding import pooling_type
from mpillama.engine.engine import Engine
from mpillama.engine.sampling.params import SamplingParams
from mpillama.errors import UserError
from mpillama.runner import Runner
from mpillama.spmd import Interrupts
from mpillama.steps import Leader, follow
from mpillama.tokenizer import Tokenizer, load_tokenizer

# The KV cache that nobody has sized: room for so many tokens of each sequence, but not less than one whole context.
_TOKENS_PER_SEQUENCE = 4096
_LEAST_TOKENS = 2048


@dataclass(frozen=True)
class Service:
    """What a command needs on rank 0 to run requests.

    Attributes:
        loaded: the model.
        leader: of the ranks that follow.
        engine: with this model behind it.
        tokenizer: of the model.
        template: chat template, None if there is neither one in the file nor a flag for one.
        metadata: of the file.
        name: of the model, for people and for clients.
        sampling: what the flags say; a request may say otherwise, also of ``ignore_eos``.
    """

    loaded: Loaded
    leader: Leader
    engine: Engine
    tokenizer: Tokenizer
    template: ChatTemplate | None
    metadata: Mapping[str, Any]
    name: str
    sampling: SamplingParams
    ignore_eos: bool


@dataclass(frozen=True)
class Prepared:
    """What rank 0 has made of the header."""

    model: Model
    tokenizer: Tokenizer
    template: ChatTemplate | None
    metadata: Mapping[str, Any]


def run_engine(
    args: Namespace,
    world: World,
    interrupts: Interrupts,
    log: Log,
    body: Callable[[Service], int],
    before: Callable[[], None] = lambda: None,
    check: Callable[[Prepared], None] = lambda prepared: None,
) -> int:
    """Load the model on all ranks, run ``body`` on rank 0 with the others behind its engine; returns its exit code.

    ``before`` runs on rank 0 ahead of everything else, and ``check`` when the header has been read, so that a mistake
    that they find costs no loading.
    """

    runner, service = open_service(args, world, log, before, check)
    interrupts.deferred = True
    if service is None:
        return follow(world, runner)
    try:
        code = body(service)
    except UserError as error:
        service.leader.stop(error.exit_code)
        error.told = True
        raise
    service.leader.stop(code)
    return code


def open_service(
    args: Namespace,
    world: World,
    log: Log,
    before: Callable[[], None] = lambda: None,
    check: Callable[[Prepared], None] = lambda prepared: None,
) -> tuple[Runner, Service | None]:
    """Load the model on all ranks; returns this rank's part and, on rank 0, what runs requests.

    The other ranks then have to `follow` rank 0's leader.

    Raises:
        UserError: on rank 0, what is wrong; PeerFailure elsewhere.
    """

    def prepare() -> tuple[Model, Prepared]:
        before()
        model, prepared = _prepare(args, world.size)
        check(prepared)
        return model, prepared

    loaded, prepared = load(args, world, log, prepare)
    made: list[Service] = []

    def make() -> None:
        if prepared is not None:
            made.append(_service(args, loaded, Leader(world, loaded.runner, loaded.model.grid.pp), prepared))

    from_root(world, make)
    return loaded.runner, made[0] if made else None


def _prepare(args: Namespace, n_ranks: int) -> tuple[Model, Prepared]:
    header, model = open_model(args, n_ranks)
    if not args.ctx_size:
        n_kv = min(n_sequences(args) * model.n_ctx, max(model.n_ctx, n_sequences(args) * _TOKENS_PER_SEQUENCE))
        model = replace(model, n_kv=n_kv, n_kv_min=min(model.n_ctx, _LEAST_TOKENS))
    file = args.chat_template_file
    override = read_text(file, "--chat-template-file") if file else args.chat_template
    template = template_from(header.metadata, override)
    return model, Prepared(model, load_tokenizer(header.metadata), template, header.metadata)


def _service(args: Namespace, loaded: Loaded, leader: Leader, prepared: Prepared) -> Service:
    model, metadata = loaded.model, prepared.metadata
    engine = Engine(
        leader,
        prepared.tokenizer,
        model.cfg.n_vocab,
        model.n_ctx,
        loaded.runner.n_blocks,
        min(args.batch_size, args.ubatch_size),
        n_sequences(args),
        pooling=pooling_type(metadata),
    )
    name = str(metadata.get("general.name") or Path(model.paths[0]).stem)
    return Service(
        loaded,
        leader,
        engine,
        prepared.tokenizer,
        prepared.template,
        metadata,
        name,
        sampling_params(args),
        args.ignore_eos,
    )
