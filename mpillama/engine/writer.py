"""Writes one continuation: chooses its tokens, turns them into text, and finds its end."""

from __future__ import annotations

import dataclasses
import math
import time

import numpy as np

from mpillama.engine.logprobs import logprob_of
from mpillama.engine.reasoning import ReasoningLimit
from mpillama.engine.request import Constraint, Output, Request
from mpillama.engine.sampling.candidates import Candidates
from mpillama.engine.sampling.chain import Sampler
from mpillama.engine.sampling.params import RANDOM_SEED, SamplingParams
from mpillama.engine.stops import StopStrings
from mpillama.errors import UserError
from mpillama.tokenizer.base import Tokenizer
from mpillama.tokenizer.stream import StreamDecoder


class Writer:
    """What a continuation needs beside its KV: sampler, decoder, stop strings, constraint.

    Args:
        request: whose continuation it is.
        index: which of them.
        tokenizer: None: there are only ids, and no end-of-generation tokens.
        n_vocab: of the logits.
        n_ctx: tokens that may be in the KV cache.

    Raises:
        UsageError: a bias on a token outside the vocabulary.
    """

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer | None, n_vocab: int, n_ctx: int) -> None:
        params = self.params = request.params
        self._request, self.index, self._n_ctx, self._n_vocab = request, index, n_ctx, n_vocab
        self._eog = tokenizer.eog_ids if tokenizer and not params.ignore_eos else frozenset()
        banned = tokenizer.eog_ids if tokenizer and params.ignore_eos else ()
        sampling = _sampling(params.sampling, index, banned)
        self._sampler = Sampler(sampling, n_vocab, n_ctx, tokenizer.token_bytes if tokenizer else None)
        windows = (sampling.repeat_last_n, sampling.dry_penalty_last_n)
        n_seen = n_ctx if min(windows) < 0 else max(windows)
        for token in request.prompt[max(0, len(request.prompt) - n_seen) :]:
            self._sampler.accept(token, generated=False)
        # A space at the beginning of an answer is its own, unless there is nothing before it.
        continues = len(request.prompt) > 1
        self._decoder = StreamDecoder(tokenizer, params.special, continues) if tokenizer else None
        self._stops = StopStrings(params.stop)
        self._constraint: Constraint | None = params.constraint.fork() if params.constraint else None
        limited = tokenizer and params.reasoning_budget >= 0
        self._reasoning = (
            ReasoningLimit(
                tokenizer, params.reasoning_budget, params.reasoning_tags, request.prompt, params.reasoning_lead
            )
            if tokenizer and limited
            else None
        )
        self._scored = params.logprobs is not None or params.n_branches > params.n
        self._n_written = 0
        self.n_sampled, self.sample_seconds, self.total_logprob = 0, 0.0, 0.0

    def n_top(self) -> int:
        """Return how many of the largest logits are enough for the next token; 0 if all are needed."""
        return 0 if self._scored or self._constraint is not None else self._sampler.n_top()

    def write(self, logits: np.ndarray | Candidates, n_past: int) -> Output:
        """Choose the next token from float32 (n_vocab,), or from the largest; ``n_past`` tokens are in the KV cache.

        The token is in the output unless it ended the text; the text goes on if there is no finish_reason.
        """
        output = Output(self._request.id, self.index)
        if self.params.max_tokens == 0:
            output.finish_reason = "length"
            return output
        try:
            token = self._sample(output, logits)
            if token in self._eog or token in self.params.stop_tokens:
                output.finish_reason, output.stop_reason = "stop", None if token in self._eog else token
                output.logprobs.clear()
                output.text = self._rest()
            else:
                self._append(output, token, n_past)
        except UserError as error:
            # It concerns this request, not the others: NaN, a grammar that leads nowhere, an id without a text.
            output.finish_reason, output.stop_reason = "error", error.line
        return output

    def _sample(self, output: Output, logits: np.ndarray | Candidates) -> int:
        began = time.perf_counter()
        token = self._choose(logits)
        self._sampler.accept(token)
        self.n_sampled += 1
        if self._scored and isinstance(logits, np.ndarray):
            logprob = logprob_of(logits, token, self.params.logprobs or 0)
            self.total_logprob += logprob.logprob
            if self.params.logprobs is not None:
                output.logprobs.append(logprob)
        self.sample_seconds += time.perf_counter() - began
        return token

    def _append(self, output: Output, token: int, n_past: int) -> None:
        """Add a token to the text, and see whether it is the last one."""
        self._n_written += 1
        output.tokens.append(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        if self._reasoning is not None:
            self._reasoning.accept(token)
        if self._decoder is not None:
            output.text = self._stops.push(self._decoder.push(token))
        if self._stops.found:
            output.finish_reason, output.stop_reason = "stop", self._stops.found
            return
        if self._constraint is not None and self._constraint.finished:
            output.finish_reason = "stop"
        elif self._n_written == self.params.max_tokens:
            output.finish_reason = "length"
        elif n_past >= self._n_ctx:
            output.finish_reason, output.stop_reason = "length", "context"
        if output.finish_reason:
            output.text += self._rest()

    def _choose(self, logits: np.ndarray | Candidates) -> int:
        forced = self._reasoning.forced() if self._reasoning is not None else None
        if forced is not None:
            return forced
        mask = self._constraint.mask() if self._constraint is not None else None
        if mask is not None:
            if isinstance(logits, Candidates):
                raise AssertionError("a grammar needs all logits")
            if mask.dtype != np.bool_:
                mask = np.unpackbits(mask.view(np.uint8), bitorder="little", count=self._n_vocab).view(np.bool_)
            if not mask.any():
                raise UserError("the grammar allows no token here; it cannot be completed with this vocabulary")
            logits = np.where(mask, logits, np.float32(-np.inf))
        return self._sampler.sample(logits)

    def _rest(self) -> str:
        """Return what is held back when no stop string can come any more."""
        if self._decoder is None:
            return ""
        return self._stops.push(self._decoder.flush()) + self._stops.flush()

    def cancel(self) -> Output:
        """Return the last output of a continuation that nobody waits for any more."""
        return Output(self._request.id, self.index, self._rest(), finish_reason="cancelled")

    @property
    def mean_logprob(self) -> float:
        """How likely its tokens were on average; kept for ``best_of`` only, and with logprobs."""
        return self.total_logprob / self.n_sampled if self.n_sampled else -math.inf


def _sampling(params: SamplingParams, index: int, banned: frozenset[int] | tuple[()]) -> SamplingParams:
    """Return the parameters of continuation ``index``: a seed of its own, and no ``banned`` token."""
    if index and params.seed not in (-1, RANDOM_SEED):
        params = dataclasses.replace(params, seed=(params.seed + index) % RANDOM_SEED)
    if banned:
        bias = (*params.logit_bias, *((token, -math.inf) for token in sorted(banned)))
        params = dataclasses.replace(params, logit_bias=bias)
    return params
