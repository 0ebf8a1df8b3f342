"""`--prompt-cache`: the KV of a text in a file, from one run to the next."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpillama.cli.engine_session import Service
from mpillama.cli.progress import Log
from mpillama.cli.session import Loaded, Model
from mpillama.engine.engine import Engine
from mpillama.errors import UsageError
from mpillama.state.file import KVShape, read_state
from mpillama.state.identity import model_identity
from mpillama.state.sequence import States
from mpillama.steps import Leader


def kv_shape(metadata: Mapping[str, Any], model: Model, type_k: str, type_v: str) -> KVShape:
    """Return what a file's KV must be to fit a model."""
    cfg = model.cfg
    identity = model_identity(metadata, model.tensors, cfg, model.paths)
    return KVShape(identity, type_k, type_v, cfg.n_layer, cfg.n_head_kv, cfg.n_embd_head_k, cfg.n_embd_head_v)


def open_states(service: Service) -> States:
    """Return a service's way to files of KV."""
    loaded = service.loaded
    shape = kv_shape(service.metadata, loaded.model, loaded.runner.type_k, loaded.runner.type_v)
    return States(service.leader, service.engine, shape, loaded.places)


class PromptCache:
    """The file of ``--prompt-cache`` on rank 0; does nothing without that flag.

    Args:
        args: flags.
        metadata: of the model.
        model: to be loaded.
        log: for what is used and saved.

    Raises:
        UserError: there is a file, but it is damaged or not of this model; found before the model is loaded.
    """

    def __init__(self, args: Namespace, metadata: Mapping[str, Any], model: Model, log: Log) -> None:
        self._path, self._read_only, self._log = args.prompt_cache, args.prompt_cache_ro, log
        if not self._path:
            return
        if args.deterministic:
            raise UsageError("--prompt-cache and --deterministic exclude each other: give one of them")
        self._shape = kv_shape(metadata, model, args.cache_type_k, args.cache_type_v)
        if Path(self._path).exists():
            read_state(self._path, self._shape)
        elif self._read_only:
            raise UsageError(f"--prompt-cache {self._path}: there is no such file; leave out --prompt-cache-ro")
        elif not Path(self._path).absolute().parent.is_dir():
            raise UsageError(f"--prompt-cache {self._path}: there is no such folder")

    def restore(self, loaded: Loaded, leader: Leader, engine: Engine, prompt: Sequence[int] | None = None) -> None:
        """Take what the file has of a prompt into the engine's cache; without one, all that it has."""
        if self._path and Path(self._path).exists():
            n = States(leader, engine, self._shape, loaded.places).load(self._path, prompt)
            self._log.info(f"prompt cache: {n} tokens of {self._path} are used")

    def save(self, loaded: Loaded, leader: Leader, engine: Engine, tokens: Sequence[int]) -> None:
        """Replace the file by what the engine's cache has of these tokens, if that is anything."""
        if self._path and not self._read_only:
            n = States(leader, engine, self._shape, loaded.places).save(self._path, tokens)
            words = f"{n} tokens saved to {self._path}" if n else "nothing saved: the text is too short"
            self._log.info(f"prompt cache: {words}")
