"""llama.cpp on the same workloads, through the llama-cpp-python package, for figures of one machine and one hour."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from mpillama.bench.plan import Test
from mpillama.errors import ModelError, UsageError, UserError
from mpillama.gguf.types import GGMLType

NAME = "llama.cpp"


def import_peer() -> ModuleType:
    """Return the package.

    Raises:
        UsageError: it is not installed, or cannot be loaded.
    """
    try:
        return import_module("llama_cpp")
    except ModuleNotFoundError:
        raise UsageError(
            f"--compare {NAME} needs the llama-cpp-python package; install it with: pip install llama-cpp-python"
        ) from None
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(
            f"--compare {NAME}: the llama-cpp-python package cannot be loaded ({reason}); install it again with: "
            "pip install --force-reinstall llama-cpp-python"
        ) from None


class Peer:
    """A model in llama.cpp, with one context at a time; used through the C interface that the package wraps.

    Args:
        path: of the model.
        n_threads: as many as all of our ranks on this host have.
        cores: that its threads may run on: those of all of our ranks on this host.
    """

    def __init__(self, path: str, n_threads: int, cores: Iterable[int]) -> None:
        self._lib: Any = import_peer()
        self._cores, self._n_threads = frozenset(cores), n_threads
        # Held on to, because the library calls it as long as it is there.
        self._quiet = self._lib.llama_log_callback(lambda level, text, data: None)
        self._lib.llama_log_set(self._quiet, ctypes.c_void_p(0))
        self._lib.llama_backend_init()
        self._context: Any = None
        self._settings: tuple[Any, ...] = ()
        self._n_filled = 0
        self._rng = np.random.default_rng(0)
        self._tokens: Any = None
        with _on_cores(self._cores):
            params = self._lib.llama_model_default_params()
            self._model = self._lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise ModelError(f"{NAME} ({self.version}) cannot load {path}; compare on a model that it knows")
        self._n_vocab = int(self._lib.llama_vocab_n_tokens(self._lib.llama_model_get_vocab(self._model)))

    @property
    def version(self) -> str:
        """The version of the package."""
        return str(getattr(self._lib, "__version__", "unknown version"))

    def prepare(self, n_ctx: int, n_batch: int, n_ubatch: int, type_k: str, type_v: str, n_parallel: int = 1) -> None:
        """Make a context for so many sequences, unless there is one with these settings."""
        settings = (n_ctx, n_batch, n_ubatch, type_k, type_v, n_parallel)
        if self._context and settings == self._settings:
            return
        self._free_context()
        params = self._lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
        params.n_seq_max = n_parallel
        params.type_k, params.type_v = int(GGMLType[type_k.upper()]), int(GGMLType[type_v.upper()])
        params.n_threads = params.n_threads_batch = self._n_threads
        with _on_cores(self._cores):
            self._context = self._lib.llama_init_from_model(self._model, params)
        if not self._context:
            raise UserError(
                f"{NAME} ({self.version}) cannot make a context of {n_ctx} tokens with -ctk {type_k} -ctv {type_v}"
            )
        self._settings, self._n_filled = settings, 0

    def test(self, test: Test, n_batch: int, warmup: bool = False) -> int:
        """Run a test, or its warm-up, after filling the cache to its depth; returns nanoseconds."""
        lib = self._lib
        memory = lib.llama_get_memory(self._context)
        with _on_cores(self._cores):
            kept = min(self._n_filled, test.n_depth)
            for sequence in range(test.n_parallel):
                lib.llama_memory_seq_rm(memory, sequence, kept, -1)
            self._evaluate(kept, test.n_depth - kept, n_batch, test.n_parallel)
            self._n_filled = n_past = test.n_depth
            began = time.perf_counter_ns()
            self._evaluate(n_past, test.n_prompt, n_batch, test.n_parallel)
            n_past += test.n_prompt
            for i in range(min(1, test.n_gen) if warmup else test.n_gen):
                self._evaluate(n_past + i, 1, n_batch, test.n_parallel)
            return time.perf_counter_ns() - began

    def _evaluate(self, n_past: int, n_tokens: int, n_batch: int, n_parallel: int) -> None:
        """Evaluate random tokens of each sequence after those in the cache, and wait for them."""
        total = n_parallel * n_tokens
        for start in range(0, total, n_batch):
            n = min(n_batch, total - start)
            tokens = self._rng.integers(0, self._n_vocab, n).tolist()
            batch = self._batch(tokens, n_past, range(start, start + n), n_tokens, n_parallel)
            status = self._lib.llama_decode(self._context, batch)
            if n_parallel > 1:
                self._lib.llama_batch_free(batch)
            if status != 0:
                raise UserError(f"{NAME} ({self.version}) failed with status {status} on {n} tokens")
        self._lib.llama_synchronize(self._context)

    def _batch(self, tokens: list[int], n_past: int, rows: range, n_tokens: int, n_parallel: int) -> Any:
        """Return a batch; row r is of sequence r // n_tokens, and the logits of each sequence's last are wanted."""
        if n_parallel == 1:
            # The batch points to the tokens, so they must outlive this call.
            self._tokens = (ctypes.c_int32 * len(tokens))(*tokens)
            return self._lib.llama_batch_get_one(self._tokens, len(tokens))
        batch = self._lib.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, (token, row) in enumerate(zip(tokens, rows, strict=True)):
            batch.token[i], batch.pos[i] = token, n_past + row % n_tokens
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, row // n_tokens
            batch.logits[i] = row % n_tokens == n_tokens - 1
        return batch

    def _free_context(self) -> None:
        if self._context:
            self._lib.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        """Free context and model."""
        self._free_context()
        if self._model:
            self._lib.llama_model_free(self._model)
            self._model = None


@contextmanager
def _on_cores(cores: frozenset[int]) -> Any:
    """Let threads that are started here run on these cores: a launcher may have bound this process to a few."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
