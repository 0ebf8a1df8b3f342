"""GGUF files byte by byte, so that tests can also write what no sane writer would."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from struct import pack

from mpillama.gguf.types import GGMLType

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {
    U8: "<B",
    I8: "<b",
    U16: "<H",
    I16: "<h",
    U32: "<I",
    I32: "<i",
    F32: "<f",
    BOOL: "<?",
    U64: "<Q",
    I64: "<q",
    F64: "<d",
}


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return pack("<Q", len(data)) + data


def scalar(type: int, value) -> bytes:
    return string(value) if type == STRING else pack(FORMATS[type], value)


def key(name: str | bytes, type: int, value) -> bytes:
    return string(name) + pack("<I", type) + scalar(type, value)


def array_body(item_type: int, items: Sequence, count: int | None = None) -> bytes:
    """Type, count and items; for arrays of arrays the items are bodies already."""
    head = pack("<IQ", item_type, len(items) if count is None else count)
    return head + b"".join(item if item_type == ARRAY else scalar(item_type, item) for item in items)


def array(name: str, item_type: int, items: Sequence, count: int | None = None) -> bytes:
    return string(name) + pack("<I", ARRAY) + array_body(item_type, items, count)


def tensor(name: str | bytes, shape: Sequence[int], type: int, offset: int, n_dims: int | None = None) -> bytes:
    n_dims = len(shape) if n_dims is None else n_dims
    return string(name) + pack("<I", n_dims) + pack(f"<{len(shape)}Q", *shape) + pack("<IQ", type, offset)


def gguf_bytes(
    keys: Iterable[bytes] = (),
    tensors: Iterable[bytes] = (),
    data: bytes = b"",
    *,
    version: int = 3,
    alignment: int = 32,
    n_keys: int | None = None,
    n_tensors: int | None = None,
) -> bytes:
    """A whole file; counts may lie."""
    keys, tensors = list(keys), list(tensors)
    n_keys = len(keys) if n_keys is None else n_keys
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    header = b"GGUF" + pack("<IQQ", version, n_tensors, n_keys) + b"".join(keys) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + data


def small_file() -> bytes:
    """A sound file with a value of every kind and three tensors."""
    keys = [
        key("general.architecture", STRING, "llama"),
        key("general.alignment", U32, 64),
        *(key(f"a.scalar{type}", type, 1) for type in FORMATS),
        *(array(f"a.array{type}", type, [1, 0, 1]) for type in FORMATS),
        array("tokenizer.ggml.tokens", STRING, ["<s>", "", "▁the", b"\xff\xfe", "</s>"]),
        array("a.nested", ARRAY, [array_body(U32, [1, 2]), array_body(STRING, ["x"]), array_body(ARRAY, [])]),
        array("a.empty", STRING, []),
    ]
    tensors = [
        tensor("token_embd.weight", (64, 2), GGMLType.Q8_0, 0),
        tensor("output_norm.weight", (5,), GGMLType.F32, 192),
        tensor("blk.0.ffn_up_exps.weight", (2, 3, 2), GGMLType.F16, 256),
    ]
    return gguf_bytes(keys, tensors, bytes(256 + 24), alignment=64)
