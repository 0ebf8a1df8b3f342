"""Models by their shape alone: headers as a file would have them, for random weights of any tensor type."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from mpillama.architectures import architecture
from mpillama.bench.weights import RANDOM_TYPES
from mpillama.config import read_config
from mpillama.errors import UsageError
from mpillama.gguf.reader import GGUFHeader, TensorInfo
from mpillama.gguf.types import GGMLType
from mpillama.tensors import Expected, expected_tensors

_ALIGNMENT = 32


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a published model; names are those of its GGUF metadata.

    Attributes:
        n_embd_head: elements of a head; 0: n_embd / n_head.
        n_ff: width of the dense feed-forward network; of each expert if there are experts.
        tied: there is no output.weight.
        biases: names within a block, without suffix, of what has a bias.
        default_type: what ``--shape NAME`` without a type stands for.
        keys: other metadata, without the architecture's prefix.
    """

    arch: str
    n_layer: int
    n_embd: int
    n_head: int
    n_head_kv: int
    n_ff: int
    n_vocab: int
    n_ctx: int
    rope_base: float
    n_embd_head: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    tied: bool = False
    biases: tuple[str, ...] = ()
    default_type: str = "Q4_K_M"
    keys: tuple[tuple[str, Any], ...] = ()


_QKV = ("attn_q", "attn_k", "attn_v")
_GPT_OSS_BIASES = (*_QKV, "attn_output", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_GPT_OSS_KEYS = (
    ("attention.sliding_window", 128),
    ("rope.scaling.type", "yarn"),
    ("rope.scaling.factor", 32.0),
    ("rope.scaling.original_context_length", 4096),
)

SHAPES: dict[str, ModelShape] = {
    # Llama 3.2 1B with a head of its own, as an untied file of it has.
    "llama-1b": ModelShape("llama", 16, 2048, 32, 8, 8192, 128256, 131072, 5e5, 64),
    "llama-3b": ModelShape("llama", 28, 3072, 24, 8, 8192, 128256, 131072, 5e5, 128, tied=True),
    "llama-8b": ModelShape("llama", 32, 4096, 32, 8, 14336, 128256, 131072, 5e5),
    "llama-70b": ModelShape("llama", 80, 8192, 64, 8, 28672, 128256, 131072, 5e5),
    "llama-405b": ModelShape("llama", 126, 16384, 128, 8, 53248, 128256, 131072, 5e5),
    "mistral-7b": ModelShape("llama", 32, 4096, 32, 8, 14336, 32768, 32768, 1e6),
    "mixtral-8x7b": ModelShape("llama", 32, 4096, 32, 8, 14336, 32000, 32768, 1e6, 0, 8, 2),
    "qwen2.5-0.5b": ModelShape("qwen2", 24, 896, 14, 2, 4864, 151936, 32768, 1e6, tied=True, biases=_QKV),
    "qwen2.5-7b": ModelShape("qwen2", 28, 3584, 28, 4, 18944, 152064, 32768, 1e6, biases=_QKV),
    "qwen3-0.6b": ModelShape("qwen3", 28, 1024, 16, 8, 3072, 151936, 40960, 1e6, 128, tied=True),
    "qwen3-4b": ModelShape("qwen3", 36, 2560, 32, 8, 9728, 151936, 40960, 1e6, 128, tied=True),
    "qwen3-8b": ModelShape("qwen3", 36, 4096, 32, 8, 12288, 151936, 40960, 1e6, 128),
    "qwen3-32b": ModelShape("qwen3", 64, 5120, 64, 8, 25600, 151936, 40960, 1e6, 128),
    "qwen3-30b-a3b": ModelShape("qwen3moe", 48, 2048, 32, 4, 768, 151936, 40960, 1e6, 128, 128, 8),
    "qwen3-235b-a22b": ModelShape("qwen3moe", 94, 4096, 64, 4, 1536, 151936, 40960, 1e6, 128, 128, 8),
    "gpt-oss-20b": ModelShape(
        "gpt-oss",
        24,
        2880,
        64,
        8,
        2880,
        201088,
        131072,
        1.5e5,
        64,
        32,
        4,
        False,
        _GPT_OSS_BIASES,
        "MXFP4",
        _GPT_OSS_KEYS,
    ),
    "gpt-oss-120b": ModelShape(
        "gpt-oss",
        36,
        2880,
        64,
        8,
        2880,
        201088,
        131072,
        1.5e5,
        64,
        128,
        4,
        False,
        _GPT_OSS_BIASES,
        "MXFP4",
        _GPT_OSS_KEYS,
    ),
    # No published model: a mixture of experts of 1e12 weights, for planning.
    "moe-1t": ModelShape("qwen3moe", 61, 7168, 64, 8, 2048, 163840, 131072, 1e6, 128, 384, 8),
    # Small enough for a test of a whole run.
    "tiny": ModelShape("llama", 4, 256, 8, 4, 768, 2048, 8192, 1e4, 32, default_type="Q8_0"),
}

# Mixtures of llama.cpp's quantizer: the type of most matrices. Any other name is a tensor type.
_MIXTURES = {"Q4_K_S": "Q4_K", "Q4_K_M": "Q4_K", "Q5_K_S": "Q5_K", "Q5_K_M": "Q5_K"}
# Rows that are no whole number of blocks get the type that llama.cpp's quantizer falls back to.
_FALLBACK = {
    GGMLType.Q2_K: GGMLType.Q4_0,
    GGMLType.Q3_K: GGMLType.Q4_0,
    GGMLType.TQ1_0: GGMLType.Q4_0,
    GGMLType.TQ2_0: GGMLType.Q4_0,
    GGMLType.Q4_K: GGMLType.Q5_0,
    GGMLType.Q5_K: GGMLType.Q5_1,
    GGMLType.Q6_K: GGMLType.Q8_0,
}
_UNCOMPRESSED = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)


def shape_header(spec: str) -> GGUFHeader:
    """Return the header of a model ``NAME[:TYPE]`` of random weights; it names no file.

    Raises:
        UsageError: there is no such shape or type.
    """
    name, type_name = split_spec(spec)
    shape = SHAPES[name]
    base = _base_type(spec, type_name)
    metadata = _metadata(name, shape)
    # read_config learns the vocabulary and the longrope factors from the tensors; the rest it reads from metadata.
    embd = TensorInfo("token_embd.weight", GGMLType.F32, (shape.n_embd, shape.n_vocab), 0, 0)
    header = GGUFHeader((), 3, _ALIGNMENT, metadata, {embd.name: embd}, 0)
    cfg = read_config(header)
    tensors: dict[str, TensorInfo] = {}
    offset = 0
    for want in expected_tensors(cfg):
        if _is_there(want, shape):
            type = _type_of(want, shape, type_name, base)
            info = TensorInfo(want.name, type, want.shape, 0, offset)
            tensors[info.name] = info
            offset += -(-info.nbytes // _ALIGNMENT) * _ALIGNMENT
    return GGUFHeader((), 3, _ALIGNMENT, metadata, tensors, offset)


def split_spec(spec: str) -> tuple[str, str]:
    """Return the shape and the type of ``NAME[:TYPE]``.

    Raises:
        UsageError: there is no such shape.
    """
    name, colon, type_name = spec.partition(":")
    if name not in SHAPES:
        raise UsageError(f"--shape {spec}: unknown shape {name!r}; there are {', '.join(SHAPES)}")
    return name, type_name.upper() if colon else SHAPES[name].default_type


def _base_type(spec: str, type_name: str) -> GGMLType:
    known = {type.name: type for type in sorted(RANDOM_TYPES)}
    type = known.get(_MIXTURES.get(type_name, type_name))
    if type is None:
        raise UsageError(f"--shape {spec}: unknown type {type_name!r}; there are {', '.join([*known, *_MIXTURES])}")
    return type


def _metadata(name: str, shape: ModelShape) -> dict[str, Any]:
    head = shape.n_embd_head or shape.n_embd // shape.n_head
    keys: dict[str, Any] = {
        "context_length": shape.n_ctx,
        "embedding_length": shape.n_embd,
        "block_count": shape.n_layer,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": head,
        "rope.freq_base": shape.rope_base,
        "vocab_size": shape.n_vocab,
    }
    if shape.n_expert:
        keys |= {"expert_count": shape.n_expert, "expert_used_count": shape.n_expert_used}
        if architecture(shape.arch).expert_width == "file":
            keys["expert_feed_forward_length"] = shape.n_ff
    keys |= dict(shape.keys)
    prefixed = {f"{shape.arch}.{key}": value for key, value in keys.items()}
    return {"general.architecture": shape.arch, "general.name": name, "tokenizer.ggml.model": "no_vocab", **prefixed}


def _is_there(want: Expected, shape: ModelShape) -> bool:
    if want.name == "output.weight":
        return not shape.tied
    if want.required:
        return True
    return _member(want.name).removesuffix(".bias") in shape.biases


def _member(name: str) -> str:
    """Return a tensor's name within its block."""
    return re.sub(r"^blk\.\d+\.", "", name)


def _type_of(want: Expected, shape: ModelShape, type_name: str, base: GGMLType) -> GGMLType:
    """Return a tensor's type, by the rules of llama.cpp's quantizer (src/llama-quant.cpp) as far as they are here."""
    name = _member(want.name)
    if len(want.shape) < 2 or not name.endswith(".weight") or name.startswith("ffn_gate_inp"):
        return GGMLType.F32
    return _fitting(_preferred(want.name, name, shape, type_name, base), want.shape[0])


def _preferred(full_name: str, name: str, shape: ModelShape, type_name: str, base: GGMLType) -> GGMLType:
    if base in _UNCOMPRESSED:
        return base
    is_head = name == "output.weight" or (shape.tied and name == "token_embd.weight")
    if base == GGMLType.MXFP4 and shape.n_expert:
        return base if name.endswith("_exps.weight") else GGMLType.Q8_0
    if is_head:
        return GGMLType.Q8_0 if base == GGMLType.Q8_0 or shape.n_embd % base.block_size else GGMLType.Q6_K
    if not full_name.startswith("blk."):
        return base
    il = int(full_name.split(".")[1])
    wide = _with_more_bits(il, shape.n_layer)
    if name == "attn_v.weight" and type_name in _MIXTURES:
        type = GGMLType.Q6_K if type_name.endswith("_M") and wide else base
        type = GGMLType.Q5_K if type_name == "Q4_K_S" and il < 4 else type
        # Where 8 query heads share a KV head, values are few and worth more bits.
        type = GGMLType.Q5_K if shape.n_layer == 80 and type == GGMLType.Q4_K else type
        return GGMLType.Q8_0 if shape.n_expert == 8 else type
    if name == "attn_k.weight" and type_name in _MIXTURES and shape.n_expert == 8:
        return GGMLType.Q8_0
    if name == "attn_output.weight" and type_name in ("Q4_K_S", "Q4_K_M") and shape.n_expert == 8:
        return GGMLType.Q5_K
    if name in ("ffn_down.weight", "ffn_down_exps.weight"):
        if type_name in ("Q4_K_M", "Q5_K_M") and wide:
            return GGMLType.Q6_K
        if type_name == "Q4_K_S" and il < shape.n_layer // 8:
            return GGMLType.Q5_K
    return base


def _with_more_bits(il: int, n_layer: int) -> bool:
    """Whether a block is among the first eighth, the last, or every third in between."""
    eighth = n_layer // 8
    return il < eighth or il >= 7 * n_layer // 8 or (il - eighth) % 3 == 2


def _fitting(type: GGMLType, n_in: int) -> GGMLType:
    if n_in % type.block_size == 0:
        return type
    other = _FALLBACK.get(type, GGMLType.IQ4_NL)
    return other if n_in % other.block_size == 0 else GGMLType.F16
