"""The sampler of one sequence: logits in, token out."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable

import numpy as np

from mpillama.engine.sampling import few, filters
from mpillama.engine.sampling.adaptive import AdaptiveP
from mpillama.engine.sampling.candidates import Candidates, column_peaks
from mpillama.engine.sampling.dry import Dry
from mpillama.engine.sampling.mirostat import Mirostat
from mpillama.engine.sampling.params import RANDOM_SEED, SamplingParams
from mpillama.engine.sampling.penalties import Penalties
from mpillama.errors import UsageError, UserError


class Sampler:
    """Chooses tokens as llama.cpp does: logit bias, the samplers in the user's order, then one draw.

    With Mirostat only the bias and the plain temperature come before it. At temp <= 0 the sampler `temperature` leaves
    one token, so that the defaults with temp 0 are an exact argmax.

    Every token takes two numbers from the generator, whatever is on, so the stream depends only on the seed and
    on how many tokens were sampled. The numbers are not llama.cpp's (std::mt19937 and the C++ library's distributions),
    so the same seed gives another text there.

    seed: the seed in use, also where the parameters asked for a random one.
    """

    def __init__(
        self,
        params: SamplingParams,
        n_vocab: int,
        n_ctx: int,
        token_bytes: Callable[[int], bytes] | None = None,
    ) -> None:
        """n_ctx: what a window of -1 means, in tokens; token_bytes: the text of a token, for DRY's sequence breakers.

        Raises UsageError for a bias on a token outside the vocabulary.
        """
        p = self.params = params
        self.n_vocab = n_vocab
        self.seed = secrets.randbelow(RANDOM_SEED) if p.seed in (-1, RANDOM_SEED) else p.seed
        self._penalties = Penalties(
            n_ctx if p.repeat_last_n < 0 else p.repeat_last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty
        )
        self._dry = Dry(
            p.dry_multiplier,
            p.dry_base,
            p.dry_allowed_length,
            n_ctx if p.dry_penalty_last_n < 0 else p.dry_penalty_last_n,
            p.dry_sequence_breakers,
            token_bytes,
        )
        self._mirostat = Mirostat(p.mirostat, p.mirostat_ent, p.mirostat_lr, n_vocab) if p.mirostat else None
        self._adaptive = AdaptiveP(p.adaptive_target, p.adaptive_decay) if "adaptive_p" in p.samplers else None
        self._bias = _sum_biases(p.logit_bias, n_vocab)
        self._forced = np.array([token for token, bias in self._bias.items() if bias == math.inf], np.int64)
        self._greedy = self._is_greedy()
        self._steps, self._last_steps = self._plan()
        self._enough = self._plan_top()
        self.reset()

    def reset(self) -> None:
        """Back to the state after construction: no history, and the generator at the start of the same seed."""
        self._bits = np.random.PCG64(self.seed)
        self._penalties.reset()
        self._dry.reset()
        for stage in (self._mirostat, self._adaptive):
            if stage is not None:
                stage.reset()

    def accept(self, token: int, generated: bool = True) -> None:
        """Adds a token to the history. Call it for each token of the prompt too, with generated=False."""
        self._penalties.accept(token)
        self._dry.accept(token)
        if generated and self._adaptive is not None:
            self._adaptive.accept(token)

    def n_top(self) -> int:
        """How many of the largest logits are enough for the next token, which is then the same; 0 if all are needed."""
        lowers = self._penalties.lowers
        return self._enough + lowers if self._enough and lowers is not None else 0

    def sample(self, logits: np.ndarray | Candidates) -> int:
        """The next token.

        logits: float32 (n_vocab,), left as they are, or at least the `n_top` largest of them.

        Raises UserError if they contain NaN or +inf, or if no token is left to choose from.
        """
        if isinstance(logits, Candidates):
            # The order of the vocabulary decides between tokens that a bias or penalty has made equal.
            c = logits.by_id() if self._bias or self._penalties.active else logits
        elif logits.shape == (self.n_vocab,) and logits.dtype == np.float32:
            c = Candidates(logits)
        else:
            raise ValueError(f"logits must be float32 ({self.n_vocab},), got {logits.dtype} {logits.shape}")
        # Raw bits, because NumPy promises them to stay the same in later versions; the top 53 make a float64 in [0, 1).
        first, second = self._bits.random_raw(2).tolist()
        u_xtc, u = (first >> 11) * 2.0**-53, (second >> 11) * 2.0**-53
        if self._greedy and not self._bias:
            # NaN, if there is one anywhere, counts as the largest.
            likeliest = int(c.logits.argmax())
            _check(c, float(c.logits[likeliest]))
            return c.token(likeliest)
        if c.ids is None:
            c = Candidates(c.logits, peaks=column_peaks(c.logits))
        _check(c, c.peak)
        c = self._biased(c)
        if self._greedy and not len(self._forced):
            likeliest = int(c.logits.argmax())
            if c.logits[likeliest] > -math.inf:
                return c.token(likeliest)
        if self._mirostat is not None:
            return self._mirostat.sample(filters.temperature(c, self.params.temp), u)
        for name in self._steps:
            c = self._apply(name, c, u_xtc)
        if self._last_steps:
            if c.descending and len(c) <= few.MOST and c.logits[0] > -math.inf:
                return few.draw(c, self._last_steps, self.params, u)
            for name in self._last_steps:
                c = self._apply(name, c, u_xtc)
        if self._adaptive is not None:
            return self._adaptive.sample(c, u)
        return c.token(c.draw(u))

    def _plan(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The samplers that do anything, and those of them at the end that `few` can run, with the draw after them."""
        p = self.params
        active = {
            "penalties": self._penalties.active,
            "dry": self._dry.active,
            "top_n_sigma": p.top_n_sigma > 0,
            "top_k": p.top_k > 0,
            "typ_p": p.typical < 1,
            "top_p": p.top_p < 1,
            "min_p": p.min_p > 0,
            "xtc": p.xtc_probability > 0 and p.xtc_threshold <= 0.5,
            "temperature": p.temp != 1 or p.dynatemp_range > 0,
            "adaptive_p": False,
        }
        steps = tuple(name for name in p.samplers if active[name])
        n = len(steps)
        while n and steps[n - 1] in few.STEPS:
            n -= 1
        plain = p.temp >= filters.GREEDY_TEMPERATURE and p.dynatemp_range <= 0 and self._adaptive is None
        return (steps[:n], steps[n:]) if plain else (steps, ())

    def _plan_top(self) -> int:
        """How many of the largest logits are enough while nothing is penalized; 0 if all are needed."""
        if self._mirostat is not None or any(bias > 0 for bias in self._bias.values()):
            return 0
        steps = [name for name in (*self._steps, *self._last_steps) if name != "penalties"]
        if self._greedy:
            return 1 + len(self._bias)
        # What comes before this must not look at the rest, nor make anything likelier; see `Penalties.lowers`.
        return self.params.top_k + len(self._bias) if steps and steps[0] == "top_k" else 0

    def _is_greedy(self) -> bool:
        """Whether the samplers only narrow down to the likeliest token, so that there is no need to run them."""
        p = self.params
        changing = (self._penalties.active, self._dry.active, self._mirostat, self._adaptive)
        cutting = ("typ_p" in p.samplers and p.typical < 1) or ("xtc" in p.samplers and p.xtc_probability > 0)
        cold = "temperature" in p.samplers and p.temp <= 0 and p.dynatemp_range <= 0
        return cold and not cutting and not any(changing)

    def _apply(self, name: str, c: Candidates, u_xtc: float) -> Candidates:
        """One sampler of the chain."""
        p = self.params
        match name:
            case "penalties":
                return self._penalties.apply(c)
            case "dry":
                return self._dry.apply(c)
            case "top_n_sigma":
                return filters.top_n_sigma(c, p.top_n_sigma)
            case "top_k":
                return filters.top_k(c, p.top_k)
            case "typ_p":
                return filters.typical(c, p.typical, p.min_keep)
            case "top_p":
                return filters.top_p(c, p.top_p, p.min_keep)
            case "min_p":
                return filters.min_p(c, p.min_p, p.min_keep)
            case "xtc":
                return filters.xtc(c, p.xtc_probability, p.xtc_threshold, p.min_keep, u_xtc)
            case "temperature":
                return filters.dynamic_temperature(c, p.temp, p.dynatemp_range, p.dynatemp_exponent)
            case "adaptive_p":
                return c  # it takes the place of the draw, wherever it is named
        raise ValueError(f"no sampler {name!r}")

    def _biased(self, c: Candidates) -> Candidates:
        """The candidates with the biases added; where some are +inf, only the tokens that have it."""
        if not self._bias:
            return c
        if len(self._forced):
            return c.take(self._forced)
        at, found = c.find(np.fromiter(self._bias.keys(), np.int64))
        logits = c.editable()
        logits[at] += np.fromiter(self._bias.values(), np.float32)[found]
        return c.with_logits(logits, owned=True)


def _sum_biases(logit_bias: tuple[tuple[int, float], ...], n_vocab: int) -> dict[int, float]:
    """The sum of the biases of each token; a ban outweighs everything."""
    total: dict[int, float] = {}
    for token, bias in logit_bias:
        if not 0 <= token < n_vocab:
            raise UsageError(f"--logit-bias: token {token} is not in the vocabulary, whose ids are 0 to {n_vocab - 1}")
        banned = -math.inf in (bias, total.get(token))
        total[token] = -math.inf if banned else total.get(token, 0.0) + bias
    return total


def _check(c: Candidates, peak: float) -> None:
    """Raises UserError for logits nothing can be drawn from; ``peak`` is the largest, NaN if there is one anywhere."""
    if math.isfinite(peak):
        return
    if peak == -math.inf:
        raise UserError(
            "the model gave every token a logit of -inf; check that the file is intact and the model supported"
        )
    bad = np.flatnonzero(np.isnan(c.logits) | (c.logits == np.inf))
    kind = "NaN" if math.isnan(peak) else "+inf"
    raise UserError(
        f"the model produced {kind} at {len(bad)} of {len(c)} logits, first at token {c.token(bad[0])}; "
        "check that the file is intact, or try another backend or precision"
    )
