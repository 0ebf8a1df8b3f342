"""From the fields of a request to the engine's parameters: OpenAI's names, and llama.cpp's for what OpenAI lacks."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from mpillama.engine.request import Constraint, RequestParams
from mpillama.engine.sampling.params import SamplingParams, parse_samplers
from mpillama.openai.constraints import GrammarConstraint
from mpillama.openai.context import Context
from mpillama.openai.errors import as_bad_request, bad
from mpillama.openai.fields import Fields

# Field in JSON: field of SamplingParams.
_NUMBERS = {
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical",
    "top_n_sigma": "top_n_sigma",
    "xtc_probability": "xtc_probability",
    "xtc_threshold": "xtc_threshold",
    "dynatemp_range": "dynatemp_range",
    "dynatemp_exponent": "dynatemp_exponent",
    "repeat_penalty": "repeat_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "dry_multiplier": "dry_multiplier",
    "dry_base": "dry_base",
    "adaptive_target": "adaptive_target",
    "adaptive_decay": "adaptive_decay",
    "mirostat_eta": "mirostat_lr",
    "mirostat_tau": "mirostat_ent",
}
_INTEGERS = ("top_k", "repeat_last_n", "dry_allowed_length", "dry_penalty_last_n", "mirostat", "min_keep")
# Ours and llama.cpp's; the last is also that of its form of Anthropic's API.
_BUDGETS = ("reasoning_budget", "reasoning_budget_tokens", "thinking_budget_tokens")
_LIMITS = ("max_completion_tokens", "max_tokens", "n_predict")
MAX_LOGPROBS = 100
_MAX_STOPS = 64


def asks_for_nothing(fields: Fields) -> bool:
    """Whether a request wants its prompt evaluated and no token."""
    return bool(fields.any(fields.first(*_LIMITS)) == 0)


def read_sampling(context: Context, fields: Fields) -> SamplingParams:
    """Return the sampling parameters; what a request leaves open is as the server was started with."""
    defaults = context.sampling
    given: dict[str, Any] = {
        own: fields.number(name, getattr(defaults, own)) for name, own in _NUMBERS.items() if fields.has(name)
    }
    for name in _INTEGERS:
        if fields.has(name):
            given[name] = fields.integer(name, 0)
    if fields.has("seed"):
        seed = fields.integer("seed", -1, -(2**63), 2**64 - 1)
        given["seed"] = seed if seed == -1 else seed % 2**32
    if fields.has("dry_sequence_breakers"):
        given["dry_sequence_breakers"] = fields.strings("dry_sequence_breakers")
    if fields.has("logit_bias"):
        given["logit_bias"] = (*defaults.logit_bias, *_logit_bias(context, fields))
    with as_bad_request():
        if isinstance(fields.any("samplers"), str):
            given["samplers"] = parse_samplers(fields.string("samplers"))
        elif fields.has("samplers"):
            given["samplers"] = parse_samplers(";".join(fields.strings("samplers")))
        return dataclasses.replace(defaults, **given)


def _logit_bias(context: Context, fields: Fields) -> list[tuple[int, float]]:
    """Read {"15043": 1.0} or [[15043, 1.0], ["text", false]]; false forbids a token."""
    value = fields.any("logit_bias")
    if isinstance(value, dict):
        pairs: list[Any] = [
            [int(key) if key.isdecimal() and len(key) < 10 else key, bias] for key, bias in value.items()
        ]
    else:
        pairs = fields.array("logit_bias")
    biases: list[tuple[int, float]] = []
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise fields.wrong("logit_bias", "an object of token ids and biases, or an array of such pairs")
        which, bias = pair
        if bias is False:
            bias = -math.inf
        if isinstance(bias, bool) or not isinstance(bias, int | float):
            raise fields.wrong("logit_bias", "an object whose values are numbers, or false")
        if isinstance(which, str):
            ids = context.tokenizer.encode(which, add_special=False)
        elif isinstance(which, int) and not isinstance(which, bool):
            ids = [which]
        else:
            raise fields.wrong("logit_bias", "an object of token ids or texts, and biases")
        for token in ids:
            if not 0 <= token < context.n_vocab:
                raise bad(f"logit_bias: token {token} is not in the vocabulary of {context.n_vocab}", "logit_bias")
            biases.append((token, max(-1e30, min(1e30, float(bias))) if math.isfinite(bias) else float(bias)))
    return biases


def read_params(
    context: Context,
    fields: Fields,
    *,
    logprobs: int | None = None,
    constraint: Constraint | None = None,
    special: bool = False,
    budget: int = -1,
) -> RequestParams:
    """Return the parameters of a request to generate.

    ``logprobs`` and what constrains the text come from elsewhere; ``budget`` of thinking is what holds by default.
    """
    if fields.any("lora"):
        raise bad("lora is not supported: there are no adapters here, so merge them into the model", "lora")
    max_tokens = fields.integer(fields.first(*_LIMITS), -1, low=-1)
    if max_tokens < 0:
        max_tokens = context.n_predict
    stop = tuple(stop for stop in fields.strings("stop") if stop)
    if len(stop) > _MAX_STOPS:
        raise bad(f"stop has {len(stop)} strings; at most {_MAX_STOPS} are accepted", "stop")
    n = fields.integer(fields.first("n_cmpl", "n"), 1, low=1, high=context.n_parallel)
    best_of = fields.integer("best_of", n, low=1, high=context.n_parallel)
    if best_of < n:
        raise bad(f"best_of must be at least n ({n}), got {best_of}", "best_of")
    if best_of > n and fields.boolean("stream"):
        raise bad("best_of cannot be streamed: which texts are best is known at the end", "best_of")
    with as_bad_request():
        return RequestParams(
            sampling=read_sampling(context, fields),
            # Nothing at all is asked of the engine as one token, which is then not shown.
            max_tokens=None if max_tokens < 0 else max(1, max_tokens),
            stop=stop,
            ignore_eos=fields.boolean("ignore_eos", context.ignore_eos),
            n=n,
            best_of=best_of if best_of > n else None,
            logprobs=logprobs,
            constraint=constraint,
            reasoning_budget=fields.integer(fields.first(*_BUDGETS), budget, low=-1),
            reasoning_tags=context.reasoning_tags,
            special=special,
            cache_prompt=fields.boolean("cache_prompt", True),
        )


def sampling_json(sampling: SamplingParams) -> dict[str, Any]:
    """Return sampling parameters by the names that requests have for them."""
    names = {own: name for name, own in _NUMBERS.items()}
    body = {names.get(field.name, field.name): getattr(sampling, field.name) for field in dataclasses.fields(sampling)}
    # JSON has no infinity: false forbids a token, as in requests.
    body["logit_bias"] = [
        {"token": token, "bias": bias if abs(bias) < 1e38 else bias > 0} for token, bias in sampling.logit_bias
    ]
    return body


def limit_json(max_tokens: int | None) -> dict[str, int]:
    """Return a limit of tokens by both of its names."""
    n = -1 if max_tokens is None else max_tokens
    return {"max_tokens": n, "n_predict": n}


def params_json(params: RequestParams) -> dict[str, Any]:
    """Return llama.cpp's ``generation_settings``: what a request has come to be."""
    return {
        **sampling_json(params.sampling),
        **limit_json(params.max_tokens),
        "stop": params.stop,
        "ignore_eos": params.ignore_eos,
        "n_probs": params.logprobs or 0,
    }


def read_constraint(context: Context, fields: Fields) -> GrammarConstraint | None:
    """Return the constraint that ``response_format``, ``json_schema``, ``grammar``, ``lark`` or ``regex`` ask for."""
    grammars = context.grammars
    found: list[tuple[str, GrammarConstraint]] = []
    if fields.has("response_format"):
        form = fields.object("response_format")
        kind = form.choice("type", "text", "json_object", "json_schema")
        with as_bad_request("response_format"):
            if kind == "json_schema":
                inner = form.object("json_schema") if form.has("json_schema") else form
                if not inner.has("schema"):
                    raise bad(f"{inner.name('schema')} is missing", inner.name("schema"))
                found.append(("response_format", grammars.json_schema(inner.any("schema"))))
            elif kind == "json_object":
                schema = form.any("schema") if form.has("schema") else {}
                found.append(("response_format", grammars.json_schema(schema)))
    for name, compile_ in (
        ("json_schema", grammars.json_schema),
        ("grammar", grammars.gbnf),
        ("lark", grammars.lark),
        ("regex", grammars.regex),
    ):
        if fields.has(name) and fields.any(name) != "":
            value = fields.any(name) if name == "json_schema" else fields.string(name)
            with as_bad_request(name):
                found.append((name, compile_(value)))
    if len(found) > 1:
        raise bad(f"{found[0][0]} and {found[1][0]} cannot be used together: give one of them", found[1][0])
    return found[0][1] if found else None
