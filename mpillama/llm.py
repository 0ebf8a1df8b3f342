"""A model inside an MPI program of one's own.

>>> from mpillama import LLM, GenerationParams
>>> with LLM("model.gguf") as llm:  # on every rank
...     (completion,) = llm.generate("Once upon a time", GenerationParams(max_tokens=32))
...     print(completion.text)
"""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import numpy as np

from mpillama.cli.api_context import api_context
from mpillama.cli.engine_session import Seat, Service, open_service
from mpillama.cli.namespace import default_namespace, set_options
from mpillama.cli.progress import Log
from mpillama.cli.serving_options import ENGINE, check_engine
from mpillama.comm.base import from_root
from mpillama.errors import PeerFailure, UsageError, UserError
from mpillama.llm_jobs import Desk, EmbeddingJob, TextJob
from mpillama.openai.context import Context
from mpillama.results import Completion, GenerationParams, Piece
from mpillama.spmd import embed, ranks_on_host

T = TypeVar("T")
Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Params = GenerationParams | Sequence[GenerationParams] | None


class LLM:
    """A model that the ranks of a communicator hold together.

    Every method is collective: all ranks of the communicator call it, in the same order. Arguments count on rank 0; the
    others may pass the same ones, or None. Results are the same on every rank, and so are errors: a `UserError` is
    raised on all of them, which may catch it and go on. As in any MPI program, another exception on one rank leaves the
    others waiting; ``mpirun python -m mpi4py program.py`` ends them all.

    Args:
        model: GGUF file; None: the demo model that comes with mpillama.
        comm: an ``mpi4py.MPI.Comm``; None: all ranks of the launch, or this process alone. With ``MPI.COMM_SELF`` every
            rank has a model of its own.
        hf_repo: in place of ``model``, a repository of Hugging Face as ``user/name:quant``.
        n_ctx: tokens of the KV cache (of a replica), shared by all sequences; None: what the model was trained with,
            and more for several sequences if there is memory.
        n_parallel: sequences that are evaluated together (in each replica); None: 16.
        n_batch: tokens of a step at most; None: 512.
        threads: CPU threads of each rank; None: its share of its host. NumPy's own are limited to as many.
        tensor_split: share of the model of each rank (of a replica); None: equal shares.
        dp: replicas of the model, among which the ranks are divided and the requests of a call shared; None: one.
        cache_type_k: of cached keys: f32, f16, bf16, q8_0 or q4_0; None: f16.
        cache_type_v: of cached values, likewise.
        backend: what computes, or a list like ``cuda,cpu``, see ``mpillama generate --help``; None: the best there is.
        chat_template: Jinja text or the name of a built-in template; None: the model's.
        verbose: say on stderr what is loaded where.

    Raises:
        UserError: on every rank: an argument, the file or the machine is wrong.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        comm: Any = None,
        *,
        hf_repo: str | None = None,
        n_ctx: int | None = None,
        n_parallel: int | None = None,
        n_batch: int | None = None,
        threads: int | None = None,
        tensor_split: Sequence[float] | None = None,
        dp: int | None = None,
        cache_type_k: str | None = None,
        cache_type_v: str | None = None,
        backend: str | None = None,
        chat_template: str | None = None,
        verbose: bool = False,
    ) -> None:
        world = self._world = embed(comm)
        if threads is None and comm is not None and world.size < ranks_on_host(os.environ):
            # The other ranks of this host are not in the communicator, but they need their cores.
            threads = max(1, len(os.sched_getaffinity(0)) // ranks_on_host(os.environ))
        given = {
            "model": ("model", model),
            "hf_repo": ("hf_repo", hf_repo),
            "ctx_size": ("n_ctx", n_ctx),
            "parallel": ("n_parallel", n_parallel),
            "batch_size": ("n_batch", n_batch),
            "ubatch_size": ("n_batch", n_batch),
            "threads": ("threads", threads),
            "tensor_split": ("tensor_split", tensor_split and ",".join(map(str, tensor_split))),
            "dp": ("dp", dp or 1),
            "cache_type_k": ("cache_type_k", cache_type_k),
            "cache_type_v": ("cache_type_v", cache_type_v),
            "backend": ("backend", backend),
            "chat_template": ("chat_template", chat_template),
            "verbose": ("verbose", verbose),
            "log_disable": ("verbose", not verbose),
        }
        try:
            args = from_root(world, lambda: _namespace(given))
            seat = open_service(args, world, Log(args, world.rank), replicas=True)
        except UserError:
            # All ranks have come here.
            world.close()
            raise
        self._seat: Seat | None = seat
        self._desk: Desk | None = None
        self._context: Context | None = None
        about = ("", 0, 0)
        if seat.service is not None:
            self._desk = Desk(seat.service.engines)
            self._context = api_context(seat.service)
            about = (seat.service.name, seat.service.engine.n_ctx, seat.service.loaded.model.cfg.n_vocab)
        self.name, self.n_ctx, self.n_vocab = world.bcast(about)

    @property
    def rank(self) -> int:
        """This rank in the communicator."""
        return self._world.rank

    @property
    def size(self) -> int:
        """Ranks that hold the model."""
        return self._world.size

    # -- calls -----------------------------------------------------------------------------------------------------

    def generate(self, prompts: Prompt | Sequence[Prompt] | None, params: Params = None) -> list[Completion]:
        """Continue prompts, together where there is room; returns a completion for each, in their order.

        Args:
            prompts: texts or token ids; one alone counts as a list of one.
            params: for all prompts, or one for each.

        Raises:
            UserError: a prompt or a parameter is wrong; nothing is computed then. What goes wrong later in one text is
                told in its ``finish_reason``.
        """
        return self._complete(lambda: _as_prompts(prompts), params, chat=False)

    def chat(self, conversations: Messages | Sequence[Messages] | None, params: Params = None) -> list[Completion]:
        """Answer conversations through the model's chat template; otherwise as `generate`.

        Args:
            conversations: one, as a list of OpenAI's messages (``{"role": …, "content": …}``), or a list of such.
            params: for all, or one for each.
        """
        return self._complete(lambda: _as_conversations(conversations), params, chat=True)

    def _complete(self, read: Callable[[], Sequence[Any]], params: Params, chat: bool) -> list[Completion]:
        def work(service: Service, desk: Desk, context: Context) -> list[Completion]:
            prompts = read()
            each = _params_of_each(params, len(prompts))
            jobs = [TextJob(context, prompt, own, chat) for prompt, own in zip(prompts, each, strict=True)]
            desk.run(jobs)
            return [job.completion() for job in jobs]

        return self._on_root(work)

    def stream(self, prompt: Prompt | Messages | None, params: GenerationParams | None = None) -> Iterator[Piece]:
        """Continue a prompt, or answer a conversation, piece by piece.

        All ranks iterate, and each sees every piece. The request begins with the first one, so that is where errors
        are raised. A loop may be left early, on all ranks after the same piece; other calls may come in between.
        """
        job: list[TextJob] = []

        def work(service: Service, desk: Desk, context: Context) -> list[Piece]:
            if not job:
                chat = bool(prompt) and not isinstance(prompt, str) and isinstance(prompt[0], Mapping)  # type: ignore[index]
                job.append(TextJob(context, prompt, params or GenerationParams(), chat))
                desk.add(job)
            while not (pieces := job[0].take_pieces()) and not job[0].done:
                desk.step()
            return [*pieces, *([_END] if job[0].done else [])]

        try:
            while True:
                for piece in self._on_root(work):
                    if piece == _END:
                        return
                    yield piece
        finally:
            if self._desk is not None and job:
                self._desk.drop(job[0])

    def embed(self, texts: Prompt | Sequence[Prompt] | None) -> np.ndarray:
        """Return a vector of length 1 for each text (or list of token ids), float32 (texts, n_embd).

        Raises:
            UserError: a text is too long, or the model's pooling is unknown.
        """

        def work(service: Service, desk: Desk, context: Context) -> np.ndarray:
            job = EmbeddingJob(context, _as_prompts(texts))
            desk.run([job])
            return job.vectors(service.loaded.model.cfg.n_embd)

        return self._on_root(work)

    def _on_root(self, work: Callable[[Service, Desk, Context], T]) -> T:
        """Run ``work`` on rank 0 with the others behind its engine, and return what it returns on every rank."""
        if self._seat is None:
            raise UsageError("this LLM is closed; make another one")
        # Ranks come here when their own work allows it; inside a step they would be taken for stuck.
        self._world.bcast(None)
        service = self._seat.service
        if service is None or self._desk is None or self._context is None:
            self._seat.follow()
            result = self._world.bcast(None)
            if isinstance(result, PeerFailure):
                raise UserError(result.message)
            return result
        try:
            value = work(service, self._desk, self._context)
        except UserError as error:
            self._stop(service, self._desk)
            self._world.bcast(PeerFailure(error.exit_code, error.line))
            raise
        except Exception as error:
            if not self._desk.stepping:
                # The others are between two steps, where they can still be told.
                self._stop(service, self._desk)
                self._world.bcast(PeerFailure(1, f"rank 0 failed: {type(error).__name__}: {error}"))
            raise
        self._stop(service, self._desk)
        return self._world.bcast(value)

    def _stop(self, service: Service, desk: Desk) -> None:
        """Let the other ranks return; what is unfinished goes on with the next call."""
        if not desk.stepping:
            service.engine.settle()
        service.stop(0)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Give the model's memory back; may be called more than once. Collective, but MPI stays as it is."""
        if self._seat is None:
            return
        self._seat = self._desk = self._context = None
        self._world.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Where one rank has failed, the others may never get here.
        if kind is None:
            self.close()


_END = Piece("", index=-1)


def _namespace(given: Mapping[str, tuple[str, Any]]) -> Namespace:
    namespace = default_namespace(ENGINE)
    if given["model"][1] is not None and given["hf_repo"][1] is not None:
        raise UsageError("model and hf_repo exclude each other: give one of them")
    set_options(namespace, ENGINE, given)
    check_engine(namespace)
    return namespace


def _params_of_each(params: Params, n: int) -> list[GenerationParams]:
    if params is None or isinstance(params, GenerationParams):
        return [params or GenerationParams()] * n
    if not isinstance(params, Sequence) or not all(isinstance(own, GenerationParams) for own in params):
        raise UsageError("params must be a GenerationParams, or a list of these")
    if len(params) != n:
        raise UsageError(f"there are {n} prompts but {len(params)} params; give one for each, or one for all")
    return list(params)


def _as_prompts(prompts: Any) -> Sequence[Any]:
    """Return a list of prompts: one text, or one list of ids, alone is one prompt."""
    if prompts is None:
        return []
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence | np.ndarray):
        raise UsageError("prompts must be a text, a list of token ids, or a list of these")
    return [prompts] if len(prompts) and isinstance(prompts[0], int | np.integer) else list(prompts)


def _as_conversations(conversations: Any) -> Sequence[Any]:
    if conversations is None:
        return []
    if not isinstance(conversations, Sequence) or isinstance(conversations, str):
        raise UsageError("a conversation must be a list of messages such as {'role': 'user', 'content': 'Hello'}")
    return [conversations] if len(conversations) and isinstance(conversations[0], Mapping) else list(conversations)
