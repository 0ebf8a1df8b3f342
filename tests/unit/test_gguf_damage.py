"""Files that are broken, cut short or no models: one clear line each, and no time or memory spent on their claims."""

import os
import re
import time
import tracemalloc
from struct import pack
from unittest.mock import Mock

import pytest

from gguf_bytes import (
    ARRAY,
    I32,
    STRING,
    U8,
    U16,
    U32,
    U64,
    array,
    array_body,
    gguf_bytes,
    key,
    small_file,
    string,
    tensor,
)
from mpillama.errors import GGUFError
from mpillama.gguf.cursor import MAX_HEADER_BYTES
from mpillama.gguf.reader import read_header
from mpillama.gguf.types import REMOVED_TYPES, GGMLType

F32, Q4_0, Q4_K, I8 = GGMLType.F32, GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.I8
HUGE = [1 << 31, (1 << 32) - 1, 1 << 40, 1 << 59, 1 << 61, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]


def error_of(path) -> str:
    """The message of the error; it is one line and starts with the file's name."""
    with pytest.raises(GGUFError) as caught:
        read_header(path)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isprintable()
    assert message.startswith(f"{os.path.basename(path)}: ")
    return message


def error_of_bytes(tmp_path, data: bytes) -> str:
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    return error_of(path)


def test_every_truncation_of_a_small_file(tmp_path):
    data = small_file()
    for n in range(len(data)):
        message = error_of_bytes(tmp_path, data[:n])
        assert "download or copy it again" in message or n < 4


BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"Hello, world", r"is not a GGUF file: it begins with b'Hell'"),
    "three bytes of the magic": (b"GGU", "is not a GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "html": (b"<!DOCTYPE html><html>", "web page"),
    "pytorch": (b"PK\3\4" + bytes(40), "PyTorch"),
    "safetensors": (pack("<Q", 80) + b'{"a":' + bytes(80), "safetensors"),
    "ggjt": (b"tjgg" + pack("<I", 3), "older than GGUF"),
    "version 0": (gguf_bytes(version=0), "is GGUF version 0"),
    "version 1": (gguf_bytes(version=1), "is GGUF version 1, which is no longer in use"),
    "version 4": (gguf_bytes(version=4), "is GGUF version 4; mpillama reads versions 2 and 3"),
    "big-endian": (b"GGUF" + pack(">IQQ", 3, 0, 0), "big-endian"),
    "big-endian version 2": (b"GGUF" + pack(">IQQ", 2, 0, 0), "big-endian"),
    "keys": (gguf_bytes(n_keys=1), "has 1 keys, too many for the 8 bytes left"),
    "tensors": (gguf_bytes(n_tensors=1 << 63), "has 9223372036854775808 tensors, too many"),
    "no room for key 2": (gguf_bytes([key("a", U64, 1)] * 1, n_keys=2), "2 keys, too many|key 2 of 2"),
    "key length": (gguf_bytes([pack("<Q", 1 << 62) + bytes(40)]), "key 1 of 1 has 4611686018427387904 bytes of text"),
    "empty key": (gguf_bytes([key("", U8, 1)]), "key 1 of 1 has an empty key"),
    "key not UTF-8": (gguf_bytes([key(b"a\xff", U8, 1)]), "key that is not UTF-8"),
    "key twice": (gguf_bytes([key("a.b", U8, 1), key("a.b", U8, 1)]), "key 'a.b' is there twice"),
    "value type": (gguf_bytes([string("a") + pack("<II", 13, 0)]), "key 'a' has a value of unknown type 13"),
    "item type": (gguf_bytes([array("a", 77, [])]), "key 'a' has a value of unknown type 77"),
    "string length": (gguf_bytes([string("a") + pack("<IQ", STRING, 99) + bytes(50)]), "key 'a' has 99 bytes of text"),
    "array length": (gguf_bytes([array("a", U32, [1, 2], count=1 << 61)]), "key 'a' has 2305843009213693952 items"),
    "bool array length": (gguf_bytes([array("a", 7, [True], count=1 << 63)]), "key 'a' has 9223372036854775808 items"),
    "string count": (gguf_bytes([array("a", STRING, ["x"], count=1 << 60)]), "key 'a' has 1152921504606846976 strings"),
    "arrays count": (gguf_bytes([array("a", ARRAY, [], count=1 << 60)]), "key 'a' has 1152921504606846976 arrays"),
    "length in a string array": (
        gguf_bytes(
            [array("a", STRING, ["x", "y"]).replace(b"\1\0\0\0\0\0\0\0y", b"\xff\xff\xff\xff\xff\xff\xff\xffy")]
        ),
        r"key 'a' goes on to byte 18446744073709551\d+, but the file has \d+",
    ),
    "nested too deep": (
        gguf_bytes([string("a") + pack("<I", ARRAY) + array_body(ARRAY, [b""], count=1) * 9]),
        "key 'a' has arrays nested more than 4 deep",
    ),
    "alignment 0": (gguf_bytes([key("general.alignment", U32, 0)]), "general.alignment is '0', not a power of two"),
    "alignment 48": (gguf_bytes([key("general.alignment", U32, 48)]), "general.alignment is '48', not a power of two"),
    "alignment -32": (gguf_bytes([key("general.alignment", I32, -32)]), "general.alignment is '-32'"),
    "alignment 2^40": (gguf_bytes([key("general.alignment", U64, 1 << 40)]), "general.alignment is '1099511627776'"),
    "alignment text": (gguf_bytes([key("general.alignment", STRING, "32\n")]), r"general.alignment is '32\\n'"),
    "alignment true": (gguf_bytes([key("general.alignment", 7, True)]), "general.alignment is 'True'"),
    "tensor twice": (gguf_bytes((), [tensor("t", (1,), F32, 0)] * 2, bytes(64)), "tensor 't' is there twice"),
    "tensor without name": (
        gguf_bytes((), [tensor("", (8,), F32, 0)], bytes(64)),
        "tensor 1 of 1 has an empty tensor name",
    ),
    "tensor name not UTF-8": (gguf_bytes((), [tensor(b"\xc3(", (8,), F32, 0)], bytes(64)), "not UTF-8"),
    "0 dimensions": (gguf_bytes((), [tensor("t", (), F32, 0)], bytes(64)), "tensor 't' has 0 dimensions, not 1 to 4"),
    "5 dimensions": (gguf_bytes((), [tensor("t", (1,) * 5, F32, 0)], bytes(64)), "tensor 't' has 5 dimensions"),
    "4 billion dimensions": (
        gguf_bytes((), [tensor("t", (1,), F32, 0, n_dims=(1 << 32) - 1)], bytes(64)),
        "tensor 't' has 4294967295 dimensions",
    ),
    "empty dimension": (
        gguf_bytes((), [tensor("t", (4, 0), F32, 0)], bytes(64)),
        r"'t' has the impossible shape \[4, 0\]",
    ),
    "overflowing shape": (
        gguf_bytes((), [tensor("t", (1 << 32, 1 << 32), F32, 0)], bytes(64)),
        r"'t' has the impossible shape \[4294967296, 4294967296\]",
    ),
    "rows of part of a block": (
        gguf_bytes((), [tensor("t", (48,), Q4_0, 0)], bytes(64)),
        "tensor 't' has rows of 48 weights, which is no whole number of Q4_0 blocks of 32",
    ),
    "rows of part of a super-block": (
        gguf_bytes((), [tensor("t", (128, 2), Q4_K, 0)], bytes(999)),
        "Q4_K blocks of 256",
    ),
    "type": (gguf_bytes((), [tensor("t", (32,), 99, 0)], bytes(64)), "tensor 't' has type number 99, which is unknown"),
    "misaligned": (
        gguf_bytes((), [tensor("t", (8,), F32, 0), tensor("u", (2,), F32, 36)], bytes(64)),
        "tensor 'u' after tensor 't' starts at byte .*, not at a multiple of 32",
    ),
    "misaligned first": (gguf_bytes((), [tensor("u", (2,), F32, 1)], bytes(64)), "tensor 'u' starts at byte"),
    "overlap": (
        gguf_bytes((), [tensor("u", (8,), F32, 32), tensor("t", (9,), F32, 0)], bytes(64)),
        "tensors 't' and 'u' overlap",
    ),
    "same place": (
        gguf_bytes((), [tensor("t", (1,), F32, 0), tensor("u", (1,), F32, 0)], bytes(64)),
        "'t' and 'u' overlap",
    ),
    "truncated data": (
        gguf_bytes((), [tensor("t", (8,), F32, 0), tensor("u", (100,), I8, 32)], bytes(32 + 93)),
        r"7 bytes are missing at its end: the file has \d+ bytes of \d+, and 1 of its 2 tensors",
    ),
    "no data": (gguf_bytes((), [tensor("t", (8,), F32, 0)]), "32 bytes are missing at its end"),
    "offset past the end": (
        gguf_bytes((), [tensor("t", (8,), F32, 1 << 63)], bytes(64)),
        "bytes are missing at its end",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_error(tmp_path, name):
    data, pattern = BROKEN[name]
    message = error_of_bytes(tmp_path, data)
    assert re.search(pattern, message), message


@pytest.mark.parametrize("number", sorted(REMOVED_TYPES))
def test_types_that_were_removed(tmp_path, number):
    message = error_of_bytes(tmp_path, gguf_bytes((), [tensor("t", (32,), number, 0)], bytes(64)))
    assert f"type number {number}, which GGUF no longer has" in message


def test_names_with_control_characters_stay_on_one_line(tmp_path):
    assert "\\n" in error_of_bytes(tmp_path, gguf_bytes((), [tensor("a\nb\x1b[2J", (1,), 99, 0)], bytes(64)))
    long = "x" * 5000
    assert len(error_of_bytes(tmp_path, gguf_bytes([key(long, U8, 1)] * 2))) < 300


def test_paths_that_are_no_models(tmp_path):
    assert "no such file" in error_of(tmp_path / "missing.gguf")
    assert "is a directory" in error_of(tmp_path)
    (tmp_path / "file").touch()
    assert "Not a directory" in error_of(tmp_path / "file" / "x.gguf")
    os.symlink(tmp_path / "missing.gguf", tmp_path / "dangling.gguf")
    assert "no such file" in error_of(tmp_path / "dangling.gguf")
    with pytest.raises(GGUFError, match="not a possible file name"):
        read_header("a\0b.gguf")


@pytest.mark.timeout(20)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    assert "is not a regular file" in error_of(tmp_path / "pipe.gguf")
    assert "is not a regular file" in error_of("/dev/null")


def test_errors_of_the_disk_are_told(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file())
    # Raised here, not provoked: the super-user may read everything, and no disk fails on demand.
    for error, text in (
        (PermissionError(13, "Permission denied"), "no permission"),
        (OSError(5, "I/O error"), "I/O error"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("builtins.open", Mock(side_effect=error))
            with pytest.raises(GGUFError, match=f"^model.gguf: .*{text}"):
                read_header(path)


def test_a_damaged_length_in_a_large_file_does_not_load_it(tmp_path):
    # The file is large enough for what the length claims; only a bound on headers keeps the reader from following it.
    path = tmp_path / "large.gguf"
    path.write_bytes(gguf_bytes([string("a") + pack("<IQ", STRING, MAX_HEADER_BYTES)]))
    os.truncate(path, 4 * MAX_HEADER_BYTES)
    tracemalloc.start()
    try:
        assert "further than a header can" in error_of(path)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_shrinks_while_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(small_file())
    whole = os.stat(path)
    path.write_bytes(small_file()[:200])
    monkeypatch.setattr(os, "fstat", lambda fd: whole)
    assert "became shorter" in error_of(path)


def mutated(rng, data: bytes) -> bytes:
    """Damage of the kinds that disks, networks and malice do."""
    data = bytearray(data)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, len(data)))
        match int(rng.integers(0, 8)):
            case 0:
                data[at] ^= 1 << int(rng.integers(0, 8))
            case 1:
                data[at] = int(rng.integers(0, 256))
            case 2:
                del data[max(4, at) :]
            case 3:
                data[at:at] = rng.bytes(int(rng.integers(1, 20)))
            case 4:
                del data[at : at + int(rng.integers(1, 20))]
            case 5 | 6:
                near = [len(data), len(data) - at, len(data) - at - 8, len(data) // 8, len(data) // 12]
                value = int(rng.choice(near)) if rng.integers(2) else HUGE[int(rng.integers(len(HUGE)))]
                data[at : at + 8] = pack("<Q", max(0, value))
            case 7:
                data[at : at + 4] = pack("<I", int(rng.integers(0, 20)))
        if not data:
            break
    return bytes(data)


def counted(tmp_path, data: bytes) -> tuple[int, int]:
    """Read a damaged file; returns whether it was accepted, and the peak of memory."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    began = time.process_time()
    accepted = 1
    try:
        header = read_header(path)
    except GGUFError as error:
        accepted = 0
        message = str(error)
        assert message.startswith("model.gguf: ")
        assert message.isprintable()
        assert len(message) < 500
    else:
        end = 0
        for info in sorted(header.tensors.values(), key=lambda info: info.offset):
            assert end <= info.offset
            end = info.offset + info.nbytes
        assert end <= len(data)
        for value in header.metadata.values():
            if not isinstance(value, str | int | float):
                list(value)
    assert time.process_time() - began < 5
    return accepted, tracemalloc.get_traced_memory()[1] - before


def test_thousands_of_damaged_files(tmp_path, rng):
    sound = small_file()
    n_accepted = 0
    tracemalloc.start()
    try:
        for _ in range(2000):
            data = mutated(rng, sound)
            accepted, peak = counted(tmp_path, data)
            n_accepted += accepted
            assert peak < (4 << 20) + 64 * len(data)
    finally:
        tracemalloc.stop()
    # Damage to a value goes unnoticed; if it never or always did, the mutations would not reach the checks.
    assert 100 < n_accepted < 1800


@pytest.mark.parametrize("layout", ["<Q", "<I"])
def test_huge_numbers_at_every_place(tmp_path, layout):
    # The keys of a file this small are its counts, types and lengths, so that each of these is hit.
    sound = small_file()
    width = len(pack(layout, 0))
    end = len(sound) - 280
    tracemalloc.start()
    try:
        for at in range(4, end - width + 1):
            value = (1 << 8 * width) - 1 if at % 2 else 1 << (8 * width - 2)
            _, peak = counted(tmp_path, sound[:at] + pack(layout, value) + sound[at + width :])
            assert peak < (4 << 20) + 64 * len(sound)
    finally:
        tracemalloc.stop()


def test_memory_stays_near_the_size_of_a_large_damaged_file(tmp_path):
    # Empty strings and arrays make the most objects of the fewest bytes.
    n = 20_000
    for item_type, item in ((STRING, bytes(8)), (ARRAY, array_body(U16, []))):
        data = gguf_bytes([array("a", item_type, [], count=n) + item * n, array("b", STRING, [], count=1 << 40)])
        tracemalloc.start()
        try:
            accepted, peak = counted(tmp_path, data)
        finally:
            tracemalloc.stop()
        assert not accepted
        assert peak < (3 << 20) + 32 * len(data)
