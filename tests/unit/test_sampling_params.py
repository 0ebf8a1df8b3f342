"""The sampling options: defaults, ranges, and how they are written on the command line."""

from __future__ import annotations

import math

import pytest

from mpillama.engine.sampling.params import (
    DEFAULT_SAMPLERS,
    SAMPLER_CODES,
    SamplingParams,
    parse_logit_bias,
    parse_sampler_seq,
    parse_samplers,
    recommended,
)
from mpillama.errors import ModelError, UsageError


def test_defaults_are_those_of_llama_cpp():
    p = SamplingParams()
    assert (p.seed, p.temp, p.top_k, p.top_p, p.min_p, p.typical, p.top_n_sigma) == (-1, 0.8, 40, 0.95, 0.05, 1, -1)
    assert (p.xtc_probability, p.xtc_threshold, p.dynatemp_range, p.dynatemp_exponent) == (0, 0.1, 0, 1)
    assert (p.repeat_last_n, p.repeat_penalty, p.presence_penalty, p.frequency_penalty) == (64, 1, 0, 0)
    assert (p.dry_multiplier, p.dry_base, p.dry_allowed_length, p.dry_penalty_last_n) == (0, 1.75, 2, 64)
    assert p.dry_sequence_breakers == ("\n", ":", '"', "*")
    assert (p.mirostat, p.mirostat_lr, p.mirostat_ent, p.min_keep, p.logit_bias) == (0, 0.1, 5, 0, ())
    assert (p.adaptive_target, p.adaptive_decay) == (-1, 0.9)
    assert p.samplers == parse_samplers("penalties;dry;top_n_sigma;top_k;typ_p;top_p;min_p;xtc;temperature")
    assert p.samplers == parse_sampler_seq("edskypmxt")


@pytest.mark.parametrize(
    ("field", "value", "flag"),
    [
        ("seed", -2, "--seed"),
        ("seed", 2**32, "--seed"),
        ("temp", math.nan, "--temp"),
        ("top_p", 7, "--top-p"),
        ("top_p", -0.1, "--top-p"),
        ("min_p", 1.1, "--min-p"),
        ("typical", 2, "--typical"),
        ("top_n_sigma", math.inf, "--top-nsigma"),
        ("xtc_probability", -1, "--xtc-probability"),
        ("xtc_threshold", 1.5, "--xtc-threshold"),
        ("dynatemp_range", -1, "--dynatemp-range"),
        ("dynatemp_exponent", math.nan, "--dynatemp-exp"),
        ("repeat_last_n", -2, "--repeat-last-n"),
        ("repeat_penalty", 0, "--repeat-penalty"),
        ("repeat_penalty", math.inf, "--repeat-penalty"),
        ("presence_penalty", math.nan, "--presence-penalty"),
        ("frequency_penalty", -math.inf, "--frequency-penalty"),
        ("dry_multiplier", -1, "--dry-multiplier"),
        ("dry_base", 0.5, "--dry-base"),
        ("dry_allowed_length", -1, "--dry-allowed-length"),
        ("dry_penalty_last_n", -3, "--dry-penalty-last-n"),
        ("dry_sequence_breakers", (":", ""), "--dry-sequence-breaker"),
        ("adaptive_target", 1.5, "--adaptive-target"),
        ("adaptive_decay", 1, "--adaptive-decay"),
        ("mirostat", 3, "--mirostat"),
        ("mirostat_lr", -0.1, "--mirostat-lr"),
        ("mirostat_ent", math.inf, "--mirostat-ent"),
        ("min_keep", -1, "min_keep"),
        ("logit_bias", ((-1, 0.0),), "--logit-bias"),
        ("logit_bias", ((1, math.nan),), "--logit-bias"),
        ("samplers", ("top_k", "typical"), "--samplers"),
    ],
)
def test_a_value_out_of_range_is_refused_by_the_name_of_its_flag(field, value, flag):
    with pytest.raises(UsageError) as error:
        SamplingParams(**{field: value})
    assert str(error.value).startswith(flag)
    assert "\n" not in str(error.value)


def test_the_message_says_the_range_and_the_value():
    with pytest.raises(UsageError, match=r"^--top-p must be between 0 and 1, got 7$"):
        SamplingParams(top_p=7)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("top_k;top_p", ("top_k", "top_p")),
        ("Top-K; TEMP ;nucleus", ("top_k", "temperature", "top_p")),
        ("topnsigma;top-n-sigma;typ;typp;minp", ("top_n_sigma", "top_n_sigma", "typ_p", "typ_p", "min_p")),
        ("adaptive-p", ("adaptive_p",)),
        ("", ()),
    ],
)
def test_sampler_names_and_aliases(text, names):
    assert parse_samplers(text) == names


@pytest.mark.parametrize("text", ["top_k;greedy", "top_k;;top_p", "infill", "top_k,top_p"])
def test_an_unknown_sampler_is_refused_and_the_known_ones_listed(text):
    with pytest.raises(UsageError) as error:
        parse_samplers(text)
    assert all(name in str(error.value) for name in SAMPLER_CODES)


def test_sampler_codes():
    assert parse_sampler_seq("kpmt") == ("top_k", "top_p", "min_p", "temperature")
    assert parse_sampler_seq("".join(SAMPLER_CODES[name] for name in DEFAULT_SAMPLERS)) == DEFAULT_SAMPLERS
    assert parse_sampler_seq("") == ()
    with pytest.raises(UsageError, match=r"'z'.*top_k \(k\)"):
        parse_sampler_seq("kz")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("15043+1", (15043, 1.0)),
        ("15043-1", (15043, -1.0)),
        (" 7 - 0.25 ", (7, -0.25)),
        ("0+1e-3", (0, 1e-3)),
        ("2-inf", (2, -math.inf)),
        ("2+inf", (2, math.inf)),
    ],
)
def test_logit_bias(text, value):
    assert parse_logit_bias(text) == value


@pytest.mark.parametrize("text", ["", "15043", "+1", "-3+1", "1*2", "1+", "1+nan", "1+2x", "hello-1", "1--1", "١+1"])
def test_a_malformed_logit_bias_is_refused(text):
    with pytest.raises(UsageError, match="--logit-bias"):
        parse_logit_bias(text)


def test_a_file_s_recommendations():
    names = ("temp", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold", "penalty_last_n", "penalty_repeat")
    values = dict(
        zip(
            (*names, "mirostat", "mirostat_tau", "mirostat_eta"),
            (0.6, 20, 0.9, 0, 1, 0.2, 32, 1.1, 2, 4, 0.2),
            strict=True,
        )
    )
    expected = {
        "temp": 0.6,
        "top_k": 20,
        "top_p": 0.9,
        "min_p": 0.0,
        "xtc_probability": 1.0,
        "xtc_threshold": 0.2,
        "repeat_last_n": 32,
        "repeat_penalty": 1.1,
        "mirostat": 2,
        "mirostat_ent": 4.0,
        "mirostat_lr": 0.2,
    }
    for as_file_has in (lambda x: x, str):
        metadata = {f"general.sampling.{name}": as_file_has(value) for name, value in values.items()}
        found = recommended(metadata)
        assert found == expected
        assert all(type(value) is type(getattr(SamplingParams, name)) for name, value in found.items())
        assert "temp" not in recommended(metadata, {"temp"})
    assert recommended({"general.name": "x", "general.sampling.unknown": 1}) == {}
    sequence = {"general.sampling.sequence": "Penalties; top-k;infill;temp"}
    assert recommended(sequence) == {"samplers": ("penalties", "top_k", "temperature")}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("top_p", 1.5, "--top-p must be between 0 and 1"),
        ("top_k", "many", "'many' is no number"),
        ("top_k", float("inf"), "inf is no number"),
        ("temp", [1], "no number"),
    ],
)
def test_a_bad_recommendation_is_told_and_can_be_overridden(key, value, message):
    metadata = {f"general.sampling.{key}": value}
    with pytest.raises(
        ModelError, match=rf"general\.sampling\.{key} of the model: .*{message}.*; give another value by its flag"
    ):
        recommended(metadata)
    assert recommended(metadata, {key}) == {}
