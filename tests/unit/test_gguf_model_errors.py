"""Sound GGUF files that are no sound models: one clear line each, whatever their metadata and tensors say."""

import dataclasses
import math
import re
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest

from gguf_bytes import STRING, gguf_bytes, key
from gguf_bytes import tensor as tensor_bytes
from headers import check_message, strings, use
from mpillama.backends.quants import SUPPORTED
from mpillama.backends.reference import ReferenceBackend
from mpillama.config import read_config
from mpillama.errors import GGUFError, UserError
from mpillama.gguf.reader import GGUFHeader, TensorInfo, read_header
from mpillama.gguf.types import GGMLType
from mpillama.loader import load_weights
from mpillama.sharding import Sharding
from mpillama.tensors import model_tensors
from tiny import write_llama

F32 = GGMLType.F32
MIB = 1 << 20


def message_of(header: GGUFHeader) -> str:
    """The message of the error that the model causes: one line, not long, and never another exception."""
    with pytest.raises(UserError) as caught:
        use(header)
    check_message(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> GGUFHeader:
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return read_header(write_llama(path, np.random.default_rng(0), GGMLType.Q8_0))


def with_key(header: GGUFHeader, name: str, value: Any) -> GGUFHeader:
    """The same header with another value of a key; None: without the key."""
    metadata = {**header.metadata, name: value}
    return dataclasses.replace(header, metadata={k: v for k, v in metadata.items() if v is not None})


def with_tensor(header: GGUFHeader, name: str, **changes: Any) -> GGUFHeader:
    changed = dataclasses.replace(header.tensors[name], **changes)
    return dataclasses.replace(header, tensors={**header.tensors, name: changed})


def without_tensor(header: GGUFHeader, name: str) -> GGUFHeader:
    return dataclasses.replace(header, tensors={k: v for k, v in header.tensors.items() if k != name})


def test_the_sound_model_is_sound(llama):
    cfg = use(llama)
    assert (cfg.n_layer, cfg.n_embd, cfg.n_head, cfg.n_head_kv, cfg.n_ff, cfg.n_vocab) == (2, 256, 4, 2, 512, 96)


KEYS = [
    ("embedding_length", 0, "embedding_length is 0; it must be between 1 and"),
    ("embedding_length", 255, r"token_embd.weight has shape \[256, 96\]; its metadata ask for \[255, 96\]"),
    ("embedding_length", 1 << 63, "embedding_length is 9223372036854775808; it must be between"),
    ("embedding_length", 3, "head_count is 4, more than embedding_length, 3"),
    ("block_count", 0, "block_count is 0"),
    ("block_count", 3, "has no tensor blk.2.attn_norm.weight"),
    ("block_count", (1 << 32) - 1, "block_count is 4294967295; it must be between 1 and 1024"),
    ("block_count", "two", "block_count is 'two'; a single integer is needed"),
    ("block_count", True, "block_count is True; a single integer"),
    ("block_count", np.array([], np.int32), "block_count is an array of 0 values; a single integer"),
    ("context_length", -1, "context_length is -1"),
    ("context_length", 1 << 40, "context_length is 1099511627776; it must be between 1 and"),
    ("feed_forward_length", 0, "no key llama.feed_forward_length"),
    ("feed_forward_length", 511, r"blk.0.ffn_gate.weight has shape \[256, 512\]; its metadata ask for \[256, 511\]"),
    ("feed_forward_length", np.array([512, 256], np.int32), "feed_forward_length is an array of 2 values; a single"),
    ("attention.head_count", 0, "attention.head_count is 0"),
    ("attention.head_count", -4, "attention.head_count is -4"),
    ("attention.head_count", 4.0, "attention.head_count is 4.0; a single integer is needed"),
    ("attention.head_count", strings("4"), "attention.head_count is an array of 1 values"),
    ("attention.head_count", [np.array([4])], "attention.head_count is an array of 1 values"),
    ("attention.head_count", 8, r"blk.0.attn_q.weight has shape \[256, 256\]; its metadata ask for \[256, 512\]"),
    ("attention.head_count", 1 << 20, "attention.head_count is 1048576; it must be between"),
    ("attention.head_count_kv", 0, "attention.head_count_kv is 0"),
    ("attention.head_count_kv", 3, "attention.head_count is 4, not a multiple of the 3 of head_count_kv"),
    ("attention.head_count_kv", 8, "not a multiple of the 8 of head_count_kv"),
    ("attention.head_count_kv", 1, r"blk.0.attn_k.weight has shape \[256, 128\]; its metadata ask for \[256, 64\]"),
    ("attention.head_count_kv", np.array([2, 1], np.uint32), "head_count_kv is an array of 2 values"),
    ("attention.key_length", 0, "attention.key_length is 0"),
    ("attention.key_length", 128, "attn_q.weight has shape"),
    ("attention.value_length", 32, "attn_v.weight has shape"),
    ("attention.layer_norm_rms_epsilon", -1e-5, "layer_norm_rms_epsilon is -1e-05; a number between 0 and"),
    ("attention.layer_norm_rms_epsilon", math.nan, "layer_norm_rms_epsilon is nan"),
    ("attention.layer_norm_rms_epsilon", "1e-5", "layer_norm_rms_epsilon is '1e-5'; a number"),
    ("attention.layer_norm_rms_epsilon", np.full(10**6, 1e-5), "layer_norm_rms_epsilon is an array of 1000000 values"),
    ("rope.dimension_count", 65, "rope.dimension_count is 65; it must be between 0 and 64"),
    ("rope.dimension_count", 63, "rope.dimension_count is 63; it must be even"),
    ("rope.freq_base", 0.0, "base frequency 0, which must be between"),
    ("rope.freq_base", 1.0, "base frequency 1, which must be between"),
    ("rope.freq_base", -10000.0, "rope.freq_base is -10000.0"),
    ("rope.freq_base", math.inf, "rope.freq_base is inf"),
    ("rope.scaling.type", "dynamic\nntk", r"rope scaling type 'dynamic\\nntk' is not supported"),
    ("rope.scaling.type", 2, "rope.scaling.type is 2; a text is needed"),
    ("rope.scaling.type", strings("yarn", "none"), "rope.scaling.type is an array of 2 values"),
    ("rope.scaling.factor", 1e-300, "frequency scale 1e[+]300"),
    ("rope.scaling.attn_factor", 0.0, "magnitude 0, which must"),
    ("expert_count", 1 << 31, "expert_count is 2147483648; it must be between 0 and"),
    ("expert_count", 4, "has 4 experts but key llama.expert_used_count says 0 are used"),
    ("expert_count", -1, "expert_count is -1"),
    ("expert_group_count", 8, "expert groups"),
]


@pytest.mark.parametrize(("name", "value", "pattern"), KEYS, ids=[f"{k} {type(v).__name__}" for k, v, _ in KEYS])
def test_absurd_keys(llama, name, value, pattern):
    message = message_of(with_key(llama, f"llama.{name}", value))
    assert re.search(pattern, message), message


@pytest.mark.parametrize(
    "name",
    [
        "embedding_length",
        "block_count",
        "context_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_missing_keys(llama, name):
    assert f"has no key llama.{name}" in message_of(with_key(llama, f"llama.{name}", None))


def test_numbers_of_experts(llama):
    def message(n: int, used: int) -> str:
        return message_of(with_key(with_key(llama, "llama.expert_count", n), "llama.expert_used_count", used))

    assert "expert_used_count is 5; it must be between 0 and 4" in message(4, 5)
    assert "no tensor blk.0.ffn_gate_inp.weight" in message(4, 2)


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (None, "no general.architecture"),
        (5, "no general.architecture"),
        (strings("llama"), "no general.architecture"),
        ("gptj", "architecture 'gptj' is not supported; mpillama runs llama, "),
        ("", "architecture '' is not supported"),
        ("llama\n", r"general.architecture is 'llama\\n', which is no architecture"),
        ("x" * 10**6, "which is no architecture"),
    ],
    ids=["missing", "number", "array", "gptj", "empty", "newline", "long"],
)
def test_unknown_architectures(llama, value, pattern):
    assert re.search(pattern, message_of(with_key(llama, "general.architecture", value)))


def test_yarn_that_cannot_be_computed(llama):
    metadata = {name.replace("llama.", "mistral3."): value for name, value in llama.metadata.items()}
    metadata |= {"general.architecture": "mistral3", "mistral3.rope.scaling.type": "yarn"}
    metadata["mistral3.rope.scaling.factor"] = 4.0
    header = dataclasses.replace(llama, metadata=metadata)
    assert use(header).rope.ext_factor == 1.0
    assert "beta_fast 0, which must" in message_of(with_key(header, "mistral3.rope.scaling.yarn_beta_fast", 0))
    assert "is -3.5" in message_of(with_key(header, "mistral3.rope.scaling.yarn_log_multiplier", -3.5))


def test_a_title_that_is_no_text_is_no_reason_to_stop(llama):
    assert use(with_key(llama, "general.name", np.arange(5))).name == "llama"


def test_each_tensor_is_needed(llama):
    for name in llama.tensors:
        if name == "output.weight":
            assert use(without_tensor(llama, name))
        else:
            assert f"has no tensor {name};" in message_of(without_tensor(llama, name))


def test_each_tensor_has_its_shape(llama, rng):
    for name, info in llama.tensors.items():
        axis = int(rng.integers(len(info.shape)))
        shape = tuple(n + 32 * (i == axis) for i, n in enumerate(info.shape))
        message = message_of(with_tensor(llama, name, shape=shape))
        asked = "token_embd.weight" if name == "token_embd.weight" else name
        if name == "token_embd.weight" and axis == 1:
            asked = "output.weight"  # The vocabulary is as large as the embedding says.
        assert re.search(rf"tensor {asked} has shape \[.*\]; its metadata ask for \[", message), message
        assert message_of(with_tensor(llama, name, shape=(*info.shape, 2)))
        assert use(with_tensor(llama, name, shape=(*info.shape, 1))) if name != "token_embd.weight" else True


def test_axes_of_the_embedding(llama):
    assert "has 1 axes instead of 2" in message_of(with_tensor(llama, "token_embd.weight", shape=(256,)))
    assert "has 3 axes instead of 2" in message_of(with_tensor(llama, "token_embd.weight", shape=(256, 96, 1)))


@pytest.mark.parametrize("type", sorted(set(GGMLType) - SUPPORTED), ids=lambda t: t.name)
def test_types_that_cannot_be_computed_with(llama, type):
    message = message_of(with_tensor(llama, "blk.1.ffn_down.weight", type=type))
    assert f"tensor blk.1.ffn_down.weight has type {type.name}, which the reference backend cannot" in message


def fused(header: GGUFHeader, suffix: str, shape: tuple[int, ...], type: GGMLType) -> GGUFHeader:
    """The header with the fused form of q, k and v of block 0."""
    name = f"blk.0.attn_qkv.{suffix}"
    tensors = dict(header.tensors)
    if suffix == "weight":
        for member in "qkv":
            del tensors[f"blk.0.attn_{member}.weight"]
    tensors[name] = TensorInfo(name, type, shape, 0, tensors["token_embd.weight"].offset)
    return dataclasses.replace(header, tensors=tensors)


def test_fused_tensors(llama):
    use(fused(llama, "weight", (256, 512), GGMLType.Q8_0))
    use(fused(llama, "bias", (512,), F32))
    for shape in ((256, 513), (512,), (256, 1, 512), (512, 1)):
        assert re.search(
            "blk.0.attn_qkv.weight has shape .* ask for 512 rows", message_of(fused(llama, "weight", shape, F32))
        )
    assert "attn_qkv.weight has shape" in message_of(fused(llama, "weight", (512,), GGMLType.Q8_0))
    assert "tensor blk.0.attn_q.weight has shape" in message_of(fused(llama, "weight", (128, 512), GGMLType.Q8_0))
    assert "a fused bias must be" in message_of(fused(llama, "bias", (512,), GGMLType.Q8_0))
    assert "attn_qkv.bias has shape" in message_of(fused(llama, "bias", (512, 1), F32))


def test_a_header_that_claims_much_costs_little(tmp_path):
    """Sizes that pass every single bound, in a real file of less than a kilobyte."""
    keys = [
        key("general.architecture", STRING, "llama"),
        key("llama.block_count", 4, 1024),
        key("llama.embedding_length", 4, 1 << 22),
        key("llama.feed_forward_length", 4, 1 << 22),
        key("llama.context_length", 4, 1 << 30),
        key("llama.attention.head_count", 4, 1 << 14),
        key("llama.attention.key_length", 4, 1 << 22),
        key("llama.attention.layer_norm_rms_epsilon", 6, 1e-5),
        key("llama.expert_count", 4, 1 << 12),
        key("llama.expert_used_count", 4, 1 << 12),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes(keys, [tensor_bytes("token_embd.weight", (1, 1), 0, 0)], bytes(32)))
    tracemalloc.start()
    try:
        began = time.process_time()
        assert "token_embd.weight has shape [1, 1]; its metadata ask for [4194304, 1]" in message_of(read_header(path))
        assert time.process_time() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


def test_a_file_that_changed_after_its_header_was_read(tmp_path, rng):
    path = write_llama(tmp_path / "m.gguf", rng)
    header = read_header(path)
    cfg = read_config(header)
    tensors = model_tensors(header, cfg)
    data = path.read_bytes()
    for content in (data[: len(data) // 2], data[: header.tensors["token_embd.weight"].offset], b""):
        path.write_bytes(content)
        with pytest.raises(GGUFError, match=r"the file ends inside [a-z_.0-9]+; copy it again"):
            load_weights(header.paths, tensors, Sharding(cfg, [1.0]), 0, ReferenceBackend())
    path.unlink()
    with pytest.raises(GGUFError, match=r"cannot read .*: No such file"):
        load_weights(header.paths, tensors, Sharding(cfg, [1.0, 2.0]), 1, ReferenceBackend())
