"""Metadata are read the way each architecture reads them."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from mpillama.architectures import ARCHITECTURES
from mpillama.config import RopeOverrides, read_config
from mpillama.errors import ModelError


def header(arch, tensors=(), **keys):
    """Return a header with the keys that every model has, changed by ``keys`` ("__" stands for ".")."""
    base = {
        "context_length": 4096,
        "embedding_length": 512,
        "block_count": 6,
        "feed_forward_length": 1024,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "logit_scale": 8.0,
    }
    if arch.endswith("moe") or arch == "gpt-oss":
        base |= {"expert_count": 8, "expert_used_count": 2, "expert_feed_forward_length": 256}
    base |= {key.replace("__", "."): value for key, value in keys.items()}
    metadata = {"general.architecture": arch, **{f"{arch}.{key}": v for key, v in base.items() if v is not None}}
    infos = dict.fromkeys(tensors) | {"token_embd.weight": SimpleNamespace(shape=(512, 1000))}
    return SimpleNamespace(metadata=metadata, tensors=infos)


@pytest.mark.parametrize("arch", [arch.name for arch in ARCHITECTURES])
def test_every_architecture_has_a_config(arch):
    cfg = read_config(header(arch))
    assert (cfg.n_layer, cfg.n_embd, cfg.n_vocab, cfg.n_head, cfg.n_head_kv) == (6, 512, 1000, 8, 2)
    assert cfg.n_embd_head_k == cfg.n_embd_head_v == 64
    assert cfg.rope.freq_base == 10000.0
    assert cfg.attn_scale == pytest.approx(1 / 8)


@pytest.mark.parametrize(
    ("arch", "keys", "windows"),
    [
        ("llama", {"attention__sliding_window": 64}, (0,) * 6),
        ("gemma2", {}, (4096, 0) * 3),
        ("gemma2", {"attention__sliding_window": 64}, (64, 0) * 3),
        ("gemma3", {"attention__sliding_window": 64}, (64,) * 5 + (0,)),
        ("gemma3", {"attention__sliding_window": 64, "attention__sliding_window_pattern": 2}, (64, 0) * 3),
        ("gpt-oss", {"attention__sliding_window": 128}, (128, 0) * 3),
        ("olmo2", {"attention__sliding_window": 64}, (64, 64, 64, 0, 64, 64)),
        (
            "gpt-oss",
            {"attention__sliding_window": 9, "attention__sliding_window_pattern": np.array([True, False, False] * 2)},
            (9, 0, 0) * 2,
        ),
    ],
)
def test_windows(arch, keys, windows):
    assert read_config(header(arch, **keys)).windows == windows


def test_rope_scalings():
    linear = read_config(header("llama", rope__scaling__type="linear", rope__scaling__factor=4.0)).rope
    assert (linear.freq_scale, linear.ext_factor, linear.attn_factor) == (0.25, 0.0, 1.0)
    old = read_config(header("llama", rope__scale_linear=2.0)).rope
    assert old.freq_scale == 0.5
    yarn = read_config(
        header(
            "qwen2", rope__scaling__type="yarn", rope__scaling__factor=4.0, rope__scaling__original_context_length=1024
        )
    ).rope
    assert (yarn.freq_scale, yarn.ext_factor, yarn.n_ctx_orig) == (0.25, 1.0, 1024)
    assert yarn.attn_factor == pytest.approx(0.1 * math.log(4) + 1)
    none = read_config(header("llama", rope__scaling__type="none", rope__scaling__factor=4.0)).rope
    assert none.freq_scale == 1.0
    with pytest.raises(ModelError, match="rope scaling type 'ntk'"):
        read_config(header("llama", rope__scaling__type="ntk"))


def test_only_some_architectures_read_yarns_keys():
    keys = {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 16.0,
        "rope__scaling__yarn_beta_fast": 8.0,
        "rope__scaling__yarn_log_multiplier": 1.0,
    }
    assert read_config(header("mistral3", **keys)).rope.beta_fast == 8.0
    assert read_config(header("mistral3", **keys)).rope.attn_factor == pytest.approx(1.0)
    assert read_config(header("qwen3", **keys)).rope.beta_fast == 32.0


def test_longrope_chooses_its_factors_by_the_context():
    keys = {"rope__scaling__type": "longrope", "rope__scaling__original_context_length": 1024}
    tensors = ("rope_factors_long.weight", "rope_factors_short.weight")
    phi = header("phi3", tensors, rope__scaling__attn_factor=1.19, **keys)
    assert read_config(phi, 1024).rope.factors == "rope_factors_short.weight"
    assert read_config(phi, 1025).rope.factors == "rope_factors_long.weight"
    assert read_config(phi).rope.factors == "rope_factors_long.weight"
    assert read_config(phi).rope.attn_factor == pytest.approx(1.19)
    assert read_config(header("llama", ("rope_freqs.weight",))).rope.factors == "rope_freqs.weight"
    assert read_config(header("qwen2", ("rope_freqs.weight",))).rope.factors == ""


def test_rope_of_windowed_blocks():
    gemma = read_config(header("gemma3", attention__sliding_window=64, rope__freq_base=1e6, rope__scaling__factor=8.0))
    assert (gemma.rope_of(5).freq_base, gemma.rope_of(5).freq_scale) == (1e6, 0.125)
    assert (gemma.rope_of(0).freq_base, gemma.rope_of(0).freq_scale) == (1e4, 1.0)
    olmo = read_config(
        header("olmo2", attention__sliding_window=64, rope__scaling__type="yarn", rope__scaling__factor=8.0)
    )
    assert (olmo.rope_of(0).freq_scale, olmo.rope_of(0).ext_factor, olmo.rope_of(0).attn_factor) == (1.0, 0.0, 1.0)
    assert olmo.rope_of(3).ext_factor == 1.0


def test_scales_of_granite_and_gemma():
    granite = read_config(header("granite", embedding_scale=12.0, residual_scale=0.22, attention__scale=0.0156))
    assert (granite.embedding_scale, granite.residual_scale, granite.logit_scale) == (12.0, 0.22, 8.0)
    assert granite.attn_scale == 0.0156
    assert read_config(header("granite", rope__scaling__finetuned=False)).rope.n_rot == 0
    gemma = read_config(header("gemma2"))
    assert gemma.embedding_scale == pytest.approx(math.sqrt(512))
    assert (gemma.attn_softcap, gemma.final_softcap) == (50.0, 30.0)
    large = read_config(header("gemma2", block_count=46, attention__key_length=128, attention__value_length=128))
    assert large.attn_scale == pytest.approx(1 / math.sqrt(512 // 8))


def test_attention_temperature_of_mistral3():
    cfg = read_config(header("mistral3", attention__temperature_scale=0.1, rope__scaling__original_context_length=2048))
    assert (cfg.attn_temperature_scale, cfg.attn_temperature_floor) == (0.1, 2048)


def test_the_command_line_overrides_rope():
    over = RopeOverrides(scaling="yarn", freq_base=5e5, freq_scale=0.5, beta_fast=16.0, orig_ctx=512)
    rope = read_config(header("llama"), overrides=over).rope
    assert (rope.freq_base, rope.freq_scale, rope.ext_factor) == (5e5, 0.5, 1.0)
    assert (rope.beta_fast, rope.n_ctx_orig) == (16.0, 512)


def test_width_of_experts():
    assert read_config(header("qwen3moe")).n_ff_exp == 256
    assert read_config(header("qwen3moe", expert_feed_forward_length=None)).n_ff_exp == 512
    assert read_config(header("olmoe")).n_ff_exp == 1024
    assert read_config(header("qwen2moe")).n_ff_shexp == 1024
    assert read_config(header("qwen2moe", expert_shared_feed_forward_length=96)).n_ff_shexp == 96
