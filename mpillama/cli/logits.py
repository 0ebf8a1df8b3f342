"""`mpillama logits`: the logits of every position of a list of tokens, for comparing runtimes."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np

from mpillama.cli.files import read_text
from mpillama.cli.memory import least_context
from mpillama.cli.progress import Log
from mpillama.cli.session import Model, load, open_model
from mpillama.comm.base import World
from mpillama.engine.sequence import Sequence
from mpillama.errors import UsageError, UserError
from mpillama.spmd import Interrupts
from mpillama.steps import Leader, follow


def run(args: Namespace, world: World, interrupts: Interrupts) -> int:
    """Run the command on this rank; returns the exit code."""
    log = Log(args, world.rank)
    loaded, tokens = load(args, world, log, lambda: _prepare(args, world.size))
    interrupts.deferred = True
    if tokens is None:
        return follow(world, loaded.runner)
    leader = Leader(world, loaded.runner)
    sequence = Sequence(tokens, np.arange(loaded.runner.n_blocks, dtype=np.int32))
    parts = []
    while sequence.pending and not interrupts.exit_code:
        batch = sequence.next_batch(min(args.batch_size, args.ubatch_size), all_logits=True)
        parts.append(leader.run(batch))
    try:
        if not interrupts.exit_code:
            _save(Path(args.out), np.concatenate(parts))
    except UserError as error:
        leader.stop(error.exit_code)
        error.told = True
        raise
    leader.stop(interrupts.exit_code)
    return interrupts.exit_code


def _prepare(args: Namespace, n_ranks: int) -> tuple[Model, list[int]]:
    tokens = _read_tokens(args.tokens_file) if args.tokens_file else list(args.tokens or ())
    if not tokens:
        raise UsageError("logits needs tokens; give --tokens 1,2,3 or --tokens-file F")
    out = Path(args.out)
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist")
    _, model = open_model(args, n_ranks)
    if len(tokens) > model.n_ctx:
        raise UsageError(f"there are {len(tokens)} tokens but the context holds {model.n_ctx}; raise -c")
    wrong = next((token for token in tokens if not 0 <= token < model.cfg.n_vocab), None)
    if wrong is not None:
        raise UsageError(f"token {wrong} is not in the vocabulary; ids go from 0 to {model.cfg.n_vocab - 1}")
    return replace(model, n_kv_min=least_context(args, model.n_kv, len(tokens))), tokens


def _read_tokens(path: str) -> list[int]:
    """Read ids separated by commas or white space."""
    words = read_text(path, "--tokens-file").replace(",", " ").split()
    try:
        return [int(word) for word in words]
    except ValueError:
        raise UsageError(f"--tokens-file {path}: token ids must be integers separated by commas or spaces") from None


def _save(path: Path, logits: np.ndarray) -> None:
    """Write float32 (n_tokens, n_vocab); exactly to ``path``, whatever its suffix."""
    try:
        with path.open("wb") as file:
            np.save(file, logits.astype(np.float32, copy=False))
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from None
