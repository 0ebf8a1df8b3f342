"""Sound GGUF files: every kind of value, against the bytes written and against the gguf package's reader."""

import os
import pickle
import time
from pathlib import Path

import gguf
import numpy as np
import pytest

from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    FORMATS,
    I8,
    STRING,
    U8,
    U32,
    U64,
    array,
    array_body,
    gguf_bytes,
    key,
    small_file,
)
from gguf_bytes import tensor as tensor_bytes
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import GGMLType
from mpillama.gguf.values import StringArray
from shared import shared

GOLDEN = [
    "deepseek2-moe",
    "gemma2-dense",
    "gemma3-dense",
    "glm4moe-moe",
    "gpt-oss-moe",
    "granite-dense",
    "llama-dense",
    "llama-moe",
    "mistral3-dense",
    "olmo2-dense",
    "olmoe-moe",
    "phi3-dense",
    "qwen2-dense",
    "qwen2moe-moe",
    "qwen3-dense",
    "qwen35-dense",
    "qwen35moe-moe",
    "qwen3moe-moe",
]


def read(tmp_path: Path, data: bytes):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    return read_header(path)


def test_every_kind_of_value(tmp_path):
    header = read(tmp_path, small_file())
    metadata = header.metadata
    for type in FORMATS:
        value, items = metadata[f"a.scalar{type}"], metadata[f"a.array{type}"]
        assert value == 1
        assert isinstance(value, bool if type == BOOL else float if type in (F32, F64) else int)
        assert isinstance(value, bool) == (type == BOOL)
        assert isinstance(items, np.ndarray)
        assert items.tolist() == [1, 0, 1]
        assert items.dtype == (np.dtype(bool) if type == BOOL else np.dtype(FORMATS[type]))
    assert metadata["general.architecture"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][:3] == ["<s>", "", "▁the"]
    assert len(metadata["tokenizer.ggml.tokens"]) == 5
    numbers, strings, nothing = metadata["a.nested"]
    assert (numbers.tolist(), list(strings), nothing) == ([1, 2], ["x"], [])
    assert list(metadata["a.empty"]) == []
    assert (header.version, header.alignment, header.file_bytes) == (3, 64, len(small_file()))


def test_random_numbers_come_back(tmp_path, rng):
    keys, expected = [], {}
    for type, layout in FORMATS.items():
        dtype = np.dtype(layout)
        raw = rng.integers(0, 256, (7, dtype.itemsize), dtype=np.uint8)
        items = raw[:, 0] % 2 == 1 if type == BOOL else raw.reshape(-1).view(dtype)
        keys += [array(f"array{type}", type, items.tolist()), key(f"scalar{type}", type, items[0].item())]
        expected[f"array{type}"], expected[f"scalar{type}"] = items, items[0].item()
    metadata = read(tmp_path, gguf_bytes(keys)).metadata
    assert list(metadata) == [name for type in FORMATS for name in (f"array{type}", f"scalar{type}")]
    for name, value in expected.items():
        np.testing.assert_array_equal(metadata[name], value)


def test_tensors_lie_where_their_data_were_put(tmp_path):
    data = small_file()
    header = read(tmp_path, data)
    start = len(data) - 280
    got = [(t.name, t.type, t.shape, t.part, t.offset - start, t.nbytes) for t in header.tensors.values()]
    assert got == [
        ("token_embd.weight", GGMLType.Q8_0, (64, 2), 0, 0, 136),
        ("output_norm.weight", GGMLType.F32, (5,), 0, 192, 20),
        ("blk.0.ffn_up_exps.weight", GGMLType.F16, (2, 3, 2), 0, 256, 24),
    ]
    assert list(header.tensors) == [name for name, *_ in got]


def test_version_2_is_read_like_version_3(tmp_path):
    third, second = (
        read(tmp_path, gguf_bytes([key("a", U8, 7)])),
        read(tmp_path, gguf_bytes([key("a", U8, 7)], version=2)),
    )
    assert (third.version, second.version) == (3, 2)
    assert third.metadata == second.metadata == {"a": 7}


@pytest.mark.parametrize("alignment", [1, 2, 32, 4096])
def test_alignment(tmp_path, alignment):
    data = gguf_bytes(
        [key("general.alignment", U32, alignment)],
        [tensor_bytes("t", (3,), GGMLType.I8, 0), tensor_bytes("u", (1,), GGMLType.I8, alignment * 4)],
        b"abc" + bytes(alignment * 4 - 3) + b"z" if alignment * 4 > 3 else b"",
        alignment=alignment,
    )
    header = read(tmp_path, data)
    t, u = header.tensors.values()
    assert (data[t.offset : t.offset + 3], data[u.offset : u.offset + 1]) == (b"abc", b"z")


def test_tensors_in_any_order_with_gaps(tmp_path):
    tensors = [tensor_bytes("b", (4,), GGMLType.F32, 128), tensor_bytes("a", (4,), GGMLType.F32, 0)]
    header = read(tmp_path, gguf_bytes((), tensors, bytes(144)))
    assert list(header.tensors) == ["b", "a"]
    assert header.tensors["b"].offset - header.tensors["a"].offset == 128


def test_a_bool_other_than_0_and_1_is_true(tmp_path):
    keys = [key("a", U8, 2).replace(b"\0\0\0\0\x02", b"\x07\0\0\0\x02"), array("b", BOOL, [])]
    keys[1] = array("b", U8, [0, 1, 255]).replace(b"\x09\0\0\0\0\0\0\0", b"\x09\0\0\0\x07\0\0\0")
    metadata = read(tmp_path, gguf_bytes(keys)).metadata
    assert metadata["a"] is True
    assert metadata["b"].tolist() == [False, True, True]


def test_tokens_that_are_not_utf8_stay_different(tmp_path):
    tokens = [bytes([byte]) for byte in range(256)]
    got = read(tmp_path, gguf_bytes([array("tokens", STRING, tokens)])).metadata["tokens"]
    assert len(set(got)) == 256
    assert [token.encode("utf-8", "surrogateescape") for token in got] == tokens


def test_single_strings_can_always_be_printed(tmp_path):
    name = read(tmp_path, gguf_bytes([key("general.name", STRING, b"caf\xe9")])).metadata["general.name"]
    assert name == "caf\ufffd"
    name.encode()


def test_string_array_is_a_sequence(tmp_path):
    words = read(tmp_path, gguf_bytes([array("w", STRING, ["a", "b", "c"])])).metadata["w"]
    assert isinstance(words, StringArray)
    assert (words[-1], words[1:], list(reversed(words)), "b" in words, words.index("c")) == (
        "c",
        ["b", "c"],
        ["c", "b", "a"],
        True,
        2,
    )
    assert words == ["a", "b", "c"]
    assert words != ["a", "b"]
    assert pickle.loads(pickle.dumps(words)) == words
    with pytest.raises(IndexError):
        words[3]


def test_without_drops_keys_and_the_rest_survives_pickling(tmp_path):
    header = read(tmp_path, small_file())
    small = header.without("tokenizer.", "a.")
    assert list(small.metadata) == ["general.architecture", "general.alignment"]
    assert "tokenizer.ggml.tokens" in header.metadata
    copy = pickle.loads(pickle.dumps(small))
    assert copy == small
    assert copy.tensors == header.tensors
    assert header.without().metadata.keys() == header.metadata.keys()


def test_only_the_header_of_a_large_file_is_read(tmp_path):
    # A sparse file of 1 TiB: reading its tensor would take hours.
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf_bytes((), [tensor_bytes("t", (1 << 20, 1 << 18), GGMLType.F32, 0)]))
    n_bytes = path.stat().st_size + (1 << 40)
    try:
        os.truncate(path, n_bytes)
    except OSError as error:
        pytest.skip(f"the file system has no sparse files of 1 TiB: {error}")
    began = time.process_time()
    header = read_header(str(path))
    assert time.process_time() - began < 0.5
    assert header.tensors["t"].nbytes == 1 << 40
    assert header.file_bytes == n_bytes
    assert header.paths == (str(path),)


def test_header_longer_than_one_read(tmp_path, rng):
    words = [bytes(rng.integers(97, 123, n, dtype=np.uint8)) for n in rng.integers(0, 40, 150_000)]
    numbers = rng.integers(0, 1 << 62, 300_000)
    keys = [array("w", STRING, words), array("n", U64, []), key("last", I8, -3)]
    keys[1] = array("n", U64, [], count=len(numbers)) + numbers.astype("<u8").tobytes()
    metadata = read(tmp_path, gguf_bytes(keys)).metadata
    assert list(metadata["w"]) == [word.decode() for word in words]
    np.testing.assert_array_equal(metadata["n"], numbers)
    assert metadata["last"] == -3


def test_what_the_gguf_package_writes(tmp_path, rng):
    path = tmp_path / "written.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(128)
    writer.add_token_list(["<s>", "été", "日本"])
    writer.add_token_scores([0.0, -1.5, 2.25])
    writer.add_rope_freq_base(1e6)
    writer.add_causal_attention(False)
    writer.add_array("some.sizes", [3, 4, 5])
    weights = {f"blk.{i}.w": rng.standard_normal((i + 1, 7)).astype(np.float32) for i in range(4)}
    for name, array_ in weights.items():
        writer.add_tensor(name, array_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    header = read_header(path)
    assert header.alignment == 128
    assert list(header.metadata["tokenizer.ggml.tokens"]) == ["<s>", "été", "日本"]
    assert header.metadata["tokenizer.ggml.scores"].tolist() == [0.0, -1.5, 2.25]
    assert header.metadata["llama.rope.freq_base"] == 1e6
    assert header.metadata["llama.attention.causal"] is False
    assert header.metadata["some.sizes"].tolist() == [3, 4, 5]
    data = path.read_bytes()
    for name, array_ in weights.items():
        info = header.tensors[name]
        assert info.shape == array_.shape[::-1]
        assert data[info.offset : info.offset + info.nbytes] == array_.tobytes()


def assert_same_as_gguf_package(path: Path) -> None:
    header, theirs = read_header(path), gguf.GGUFReader(path)
    assert [(t.name, int(t.type), t.shape, t.offset, t.nbytes) for t in header.tensors.values()] == [
        (t.name, int(t.tensor_type), tuple(t.shape.tolist()), t.data_offset, t.n_bytes) for t in theirs.tensors
    ]
    fields = {name: field for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(fields)
    for name, field in fields.items():
        ours, contents = header.metadata[name], field.contents()
        if isinstance(contents, list):
            ours = list(ours)
        np.testing.assert_array_equal(ours, contents, err_msg=name)


def test_golden_models():
    paths = sorted(shared("golden").glob("*.gguf"))
    assert paths
    for path in paths:
        assert_same_as_gguf_package(path)


def test_small_file_against_the_gguf_package(tmp_path):
    path = tmp_path / "m.gguf"
    # Nested arrays are left out: the package flattens them.
    keys = [key("general.architecture", STRING, "llama"), *(array(f"a{type}", type, [1, 0, 1]) for type in FORMATS)]
    path.write_bytes(gguf_bytes(keys, [tensor_bytes("t", (32, 2, 3), GGMLType.Q4_0, 0)], bytes(108)))
    assert_same_as_gguf_package(path)


def test_a_large_vocabulary_opens_quickly():
    path = shared("vocab", "ggml-vocab-llama-bpe.gguf")
    began = time.process_time()
    header = read_header(path)
    assert time.process_time() - began < 0.5
    tokens = header.metadata["tokenizer.ggml.tokens"]
    assert (len(tokens), tokens[0], tokens[-1]) == (128256, "!", "<|reserved_special_token_250|>")


def test_depth_of_nested_arrays(tmp_path):
    body = array_body(U8, [1])
    for _ in range(3):
        body = array_body(ARRAY, [body])
    value = read(tmp_path, gguf_bytes([key("a", U32, 0)[:-8] + b"\x09\0\0\0" + body])).metadata["a"]
    assert value[0][0][0].tolist() == [1]
