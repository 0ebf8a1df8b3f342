"""From a loaded model to what API requests are read against."""

from __future__ import annotations

from mpillama.cli.engine_session import Service
from mpillama.openai.context import Context


def api_context(service: Service, name: str = "") -> Context:
    """Return the context of `openai.calls.open_call`; clients see the model under ``name``, by default its own."""
    return Context(
        name=name or service.name,
        tokenizer=service.tokenizer,
        template=service.template,
        n_vocab=service.loaded.model.cfg.n_vocab,
        n_ctx=service.engine.n_ctx,
        n_parallel=service.engine.n_parallel,
        sampling=service.sampling,
        ignore_eos=service.ignore_eos,
        n_predict=service.n_predict,
        reasoning_budget=service.reasoning_budget,
        template_kwargs=service.template_kwargs,
    )
