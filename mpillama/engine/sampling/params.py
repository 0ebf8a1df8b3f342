"""What the user may set about sampling: llama.cpp's options with llama.cpp's defaults, and how they are written."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

from mpillama.errors import ModelError, UsageError

# llama.cpp's names and one-letter codes; `infill` ('i') is the one it has and this program has not.
SAMPLER_CODES = {
    "penalties": "e",
    "dry": "d",
    "top_n_sigma": "s",
    "top_k": "k",
    "typ_p": "y",
    "top_p": "p",
    "min_p": "m",
    "xtc": "x",
    "temperature": "t",
    "adaptive_p": "a",
}
DEFAULT_SAMPLERS = ("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature")

# What llama.cpp understands too.
_ALIASES = {alias: name for name in SAMPLER_CODES for alias in (name, name.replace("_", "-"), name.replace("_", ""))}
_ALIASES |= {"nucleus": "top_p", "temp": "temperature", "typ": "typ_p"}

# The seed that means a random one is -1 on the command line and its uint32 twin in llama.cpp.
RANDOM_SEED = 0xFFFFFFFF


@dataclass(frozen=True)
class SamplingParams:
    """How to choose the next token. Checked on construction: a value out of range raises UsageError naming the flag.

    `ignore_eos` has no field: the caller adds a bias of -inf for each end-of-generation token to `logit_bias`.
    """

    seed: int = -1  # -1 or 4294967295: a random one
    temp: float = 0.8  # <= 0: greedy
    top_k: int = 40  # <= 0: off
    top_p: float = 0.95  # 1: off
    min_p: float = 0.05  # 0: off
    typical: float = 1.0  # 1: off
    top_n_sigma: float = -1.0  # <= 0: off
    xtc_probability: float = 0.0  # 0: off
    xtc_threshold: float = 0.1  # > 0.5: off
    dynatemp_range: float = 0.0  # 0: off
    dynatemp_exponent: float = 1.0
    repeat_last_n: int = 64  # tokens; 0: off, -1: the context size
    repeat_penalty: float = 1.0  # 1: off
    presence_penalty: float = 0.0  # 0: off
    frequency_penalty: float = 0.0  # 0: off
    dry_multiplier: float = 0.0  # 0: off
    dry_base: float = 1.75
    dry_allowed_length: int = 2  # tokens
    dry_penalty_last_n: int = 64  # tokens; 0: off, -1: the context size
    dry_sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    adaptive_target: float = -1.0  # < 0: a plain draw
    adaptive_decay: float = 0.9
    mirostat: int = 0  # 0: off, else the version, 1 or 2
    mirostat_lr: float = 0.1
    mirostat_ent: float = 5.0  # bits
    min_keep: int = 0
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, bias); -inf bans, +inf leaves only such tokens
    samplers: tuple[str, ...] = DEFAULT_SAMPLERS

    def __post_init__(self) -> None:
        """Raises UsageError for the first value that is out of range."""
        _between("--seed", self.seed, -1, RANDOM_SEED)
        _between("--temp", self.temp)
        _between("--top-k", self.top_k)
        _between("--top-p", self.top_p, 0, 1)
        _between("--min-p", self.min_p, 0, 1)
        _between("--typical", self.typical, 0, 1)
        _between("--top-nsigma", self.top_n_sigma)
        _between("--xtc-probability", self.xtc_probability, 0, 1)
        _between("--xtc-threshold", self.xtc_threshold, 0, 1)
        _between("--dynatemp-range", self.dynatemp_range, 0)
        _between("--dynatemp-exp", self.dynatemp_exponent, 0)
        _between("--repeat-last-n", self.repeat_last_n, -1)
        _between("--repeat-penalty", self.repeat_penalty)
        # The reciprocal has to be a float32 as well.
        if self.repeat_penalty < 1e-38:
            raise UsageError(f"--repeat-penalty must be greater than 0, got {self.repeat_penalty}")
        _between("--presence-penalty", self.presence_penalty)
        _between("--frequency-penalty", self.frequency_penalty)
        _between("--dry-multiplier", self.dry_multiplier, 0)
        _between("--dry-base", self.dry_base, 1)
        _between("--dry-allowed-length", self.dry_allowed_length, 0)
        _between("--dry-penalty-last-n", self.dry_penalty_last_n, -1)
        if "" in self.dry_sequence_breakers:
            raise UsageError('--dry-sequence-breaker must not be empty; give "none" for no breakers')
        _between("--adaptive-target", self.adaptive_target, high=1)
        _between("--adaptive-decay", self.adaptive_decay, 0, 0.99)
        _between("--mirostat", self.mirostat, 0, 2)
        _between("--mirostat-lr", self.mirostat_lr, 0)
        _between("--mirostat-ent", self.mirostat_ent, 0)
        _between("min_keep", self.min_keep, 0)
        for token, bias in self.logit_bias:
            if token < 0 or math.isnan(bias):
                raise UsageError(f"--logit-bias needs a token id and a number, got {token} and {bias}")
        for name in self.samplers:
            if name not in SAMPLER_CODES:
                raise UsageError(_unknown("--samplers", name))


# What a model's file may have under general.sampling, and the fields that it sets.
_RECOMMENDED = {
    "temp": "temp",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "penalty_last_n": "repeat_last_n",
    "penalty_repeat": "repeat_penalty",
    "mirostat": "mirostat",
    "mirostat_eta": "mirostat_lr",
    "mirostat_tau": "mirostat_ent",
    "sequence": "samplers",
}


def recommended(metadata: Mapping[str, Any], given: Container[str] = ()) -> dict[str, Any]:
    """Return what a model's file recommends for fields of SamplingParams that are not ``given``, as llama.cpp reads it.

    Args:
        metadata: of the file; ``general.sampling.*`` are numbers, or texts of them, and ``sequence`` is as in
            `parse_samplers`, but names that are unknown are left out.
        given: names of fields.

    Raises:
        ModelError: a value is no number, or out of range.
    """
    found: dict[str, Any] = {}
    for key, name in _RECOMMENDED.items():
        value = metadata.get(f"general.sampling.{key}")
        if value is None or name in given:
            continue
        try:
            if name == "samplers":
                found[name] = tuple(
                    _ALIASES[part] for part in str(value).lower().replace(" ", "").split(";") if part in _ALIASES
                )
            else:
                found[name] = type(getattr(SamplingParams, name))(value)
            SamplingParams(**{name: found[name]})
        except (TypeError, ValueError, OverflowError, UsageError) as error:
            reason = str(error) if isinstance(error, UsageError) else f"{value!r} is no number"
            raise ModelError(f"general.sampling.{key} of the model: {reason}; give another value by its flag") from None
    return found


def parse_samplers(text: str) -> tuple[str, ...]:
    """Sampler names in order, from `--samplers "top_k;top_p;temperature"`; an empty text means none.

    Case does not matter, and llama.cpp's aliases are understood: top-k, topk, nucleus, temp, typ. Raises UsageError for
    an unknown name (llama.cpp ignores it with a warning).
    """
    parts = [part.strip() for part in text.split(";")] if text.strip() else []
    for part in parts:
        if part.lower() not in _ALIASES:
            raise UsageError(_unknown("--samplers", part))
    return tuple(_ALIASES[part.lower()] for part in parts)


def parse_sampler_seq(text: str) -> tuple[str, ...]:
    """Sampler names in order, from the one-letter codes of `--sampler-seq edskypmxt`. Raises UsageError."""
    names = {code: name for name, code in SAMPLER_CODES.items()}
    for code in text.strip():
        if code not in names:
            raise UsageError(_unknown("--sampler-seq", code))
    return tuple(names[code] for code in text.strip())


def parse_logit_bias(text: str) -> tuple[int, float]:
    """(token id, bias) from `15043+1`, `15043-0.5` or `15043-inf`. Raises UsageError."""
    match = re.fullmatch(r"\s*(\d+)\s*([+-])\s*((?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|inf|infinity)\s*", text, re.ASCII)
    if match is None:
        raise UsageError(
            f"--logit-bias must be a token id, a sign and a number, such as 15043-1 or 2-inf, got {text!r}"
        )
    token, sign, bias = match.groups()
    return int(token), float(sign + bias)


def _between(flag: str, value: float, low: float = -math.inf, high: float = math.inf) -> None:
    """Raises UsageError unless the value is a finite number from low to high."""
    if math.isfinite(value) and low <= value <= high:
        return
    if low > -math.inf and high < math.inf:
        rule = f"between {low} and {high}"
    elif low > -math.inf:
        rule = f"a finite number of at least {low}"
    elif high < math.inf:
        rule = f"a finite number of at most {high}"
    else:
        rule = "a finite number"
    raise UsageError(f"{flag} must be {rule}, got {value}")


def _unknown(flag: str, name: str) -> str:
    """The message for a sampler that does not exist."""
    known = ", ".join(f"{name} ({code})" for name, code in SAMPLER_CODES.items())
    return f"{flag}: unknown sampler {name!r}; the samplers are {known}"
