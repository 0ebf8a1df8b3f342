"""Headers of GGUF files, versions 2 and 3, also of models split over several files.

Every count, length, offset, type and dimension is checked against the real size of the file before it is used, so a damaged
file costs no more memory than it has bytes, and is refused with one line. The file is read front to back in large pieces
up to the end of the header; tensor data is never touched. Format: ggml's docs/gguf.md.
"""

from __future__ import annotations

import os
import re
import stat
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from mpillama.errors import GGUFError
from mpillama.gguf.types import GGMLType, row_bytes

_CHUNK = 1 << 20
_MAX_DEPTH = 4
_MAX_ALIGNMENT = 1 << 20
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf")

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: in GGUF order: the in axis (along a row) first.
        part: index of its file in `GGUFHeader.paths`.
        offset: of its first byte in that file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    part: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape[1:]) * row_bytes(self.type, self.shape[0])


@dataclass
class GGUFHeader:
    """Everything of a model but its weights.

    Attributes:
        metadata: int, float, bool or str; numeric arrays as NumPy arrays, arrays of strings as `Strings`.
        tensors: by name, in the order of the files.
        file_bytes: size of all files together.
    """

    paths: tuple[str, ...]
    version: int
    alignment: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    file_bytes: int

    def without(self, *prefixes: str) -> GGUFHeader:
        """Return the header without the metadata whose keys have one of these prefixes."""
        return replace(self, metadata={k: v for k, v in self.metadata.items() if not k.startswith(prefixes)})


class Strings(Sequence[str]):
    """An array of strings that is decoded when it is first looked at: most ranks never do.

    Bytes that are not UTF-8 become surrogate escapes, so that different strings stay different.
    """

    def __init__(self, raw: bytes, count: int) -> None:
        self._raw, self._count = raw, count
        self._items: list[str] | None = None

    def _decoded(self) -> list[str]:
        if self._items is None:
            items, pos, raw = [], 0, self._raw
            for _ in range(self._count):
                (n,) = struct.unpack_from("<Q", raw, pos)
                items.append(raw[pos + 8 : pos + 8 + n].decode("utf-8", "surrogateescape"))
                pos += 8 + n
            self._items, self._raw = items, b""
        return self._items

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._decoded()[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._decoded())


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check the header of a model; of a split model ``path`` is the first part, and all parts are read.

    Raises:
        GGUFError: the file is missing, unreadable, damaged, truncated, or not GGUF.
    """
    first = _read_part(os.fspath(path), 0)
    count, number = _split_key(first, "split.count"), _split_key(first, "split.no")
    if count <= 1:
        return first
    name = _PART_NAME.fullmatch(os.path.basename(first.paths[0]))
    if name is None or int(name["count"]) != count:
        raise GGUFError(f"{path}: is one of {count} parts, which must be named like model-00001-of-{count:05}.gguf")
    folder = Path(path).parent
    if number != 0 or int(name["no"]) != 1:
        start = folder / f"{name['stem']}-00001-of-{count:05}.gguf"
        raise GGUFError(f"{path}: is part {int(name['no'])} of a split model; give the first part, {start}")
    for part in range(1, count):
        _join(first, _read_part(str(folder / f"{name['stem']}-{part + 1:05}-of-{count:05}.gguf"), part), part)
    expected = _split_key(first, "split.tensors.count")
    if expected and expected != len(first.tensors):
        raise GGUFError(f"{path}: the parts hold {len(first.tensors)} tensors, not {expected}; parts of different models?")
    return first


def _split_key(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(key, 0)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 99999999:
        raise GGUFError(f"{header.paths[0]}: key {key} is not a number of parts or tensors; the file is damaged")
    return value


def _join(first: GGUFHeader, other: GGUFHeader, part: int) -> None:
    if _split_key(other, "split.no") != part:
        raise GGUFError(f"{other.paths[0]}: calls itself part {_split_key(other, 'split.no') + 1}, not {part + 1}")
    for name in other.tensors:
        if name in first.tensors:
            raise GGUFError(f"{other.paths[0]}: tensor {name} is in another part already; the parts do not fit together")
    first.paths += other.paths
    first.tensors.update(other.tensors)
    first.file_bytes += other.file_bytes


def _read_part(path: str, part: int) -> GGUFHeader:
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise GGUFError(f"{path}: is a directory; give a .gguf file")
        if not stat.S_ISREG(status.st_mode):
            raise GGUFError(f"{path}: is not a regular file; give a .gguf file")
        with open(path, "rb", buffering=0) as file:
            return _Parser(path, part, file, os.fstat(file.fileno()).st_size).parse()
    except FileNotFoundError:
        raise GGUFError(f"{path}: no such file") from None
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise GGUFError(f"{path!r}: is not a path: {error}") from None


class _Parser:
    """Reads one file from the front; ``_data`` holds what has been read, ``_pos`` is where the parser stands."""

    def __init__(self, path: str, part: int, file: BinaryIO | Any, size: int) -> None:
        self._path, self._part, self._file, self._size = path, part, file, size
        self._data = bytearray()
        self._pos = 0

    def _error(self, message: str) -> GGUFError:
        return GGUFError(f"{self._path}: {message}")

    def _need(self, n: int, what: str) -> None:
        """Make sure that ``n`` more bytes are at hand."""
        stop = self._pos + n
        if stop > self._size:
            raise self._error(f"ends inside {what}; the file is truncated or damaged, copy it again")
        while len(self._data) < stop:
            piece = self._file.read(max(_CHUNK, stop - len(self._data)))
            if not piece:
                raise self._error(f"ends inside {what}; the file has become shorter while it was read")
            self._data += piece

    def _scalar(self, form: str, what: str) -> Any:
        n = struct.calcsize(form)
        self._need(n, what)
        (value,) = struct.unpack_from(form, self._data, self._pos)
        self._pos += n
        return value

    def _bytes(self, what: str) -> bytes:
        n = self._scalar("<Q", what)
        self._need(n, what)
        self._pos += n
        return bytes(self._data[self._pos - n : self._pos])

    def _name(self, what: str) -> str:
        try:
            return self._bytes(what).decode("utf-8")
        except UnicodeDecodeError:
            raise self._error(f"{what} is not UTF-8 text; the file is damaged") from None

    def parse(self) -> GGUFHeader:
        if self._size == 0:
            raise self._error("is empty; copy it again")
        self._need(min(4, self._size), "the magic number")
        magic = bytes(self._data[:4])
        if magic != b"GGUF"[: len(magic)]:
            raise self._error(f"is not a GGUF file (it starts with {magic!r})")
        self._need(4, "the magic number")
        self._pos = 4
        version = self._scalar("<I", "the version")
        if version & 0xFFFF == 0 and version:
            raise self._error("is big-endian; mpillama reads little-endian files, convert it with gguf-convert-endian")
        if version not in (2, 3):
            raise self._error(f"is GGUF version {version}; mpillama reads versions 2 and 3, convert the model again")
        n_tensors = self._scalar("<Q", "the number of tensors")
        n_keys = self._scalar("<Q", "the number of keys")
        if n_keys * _MIN_KEY_BYTES > self._size or n_tensors * _MIN_TENSOR_BYTES > self._size:
            raise self._error(
                f"claims {n_keys} keys and {n_tensors} tensors, more than its {self._size} bytes can hold; it is damaged"
            )
        metadata = self._metadata(n_keys)
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"key general.alignment is {alignment!r}; it must be a power of two")
        tensors = self._tensors(n_tensors, alignment)
        return GGUFHeader((self._path,), version, alignment, metadata, tensors, self._size)

    def _metadata(self, n_keys: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for i in range(n_keys):
            key = self._name(f"the name of key {i + 1} of {n_keys}")
            if key in metadata:
                raise self._error(f"has key {key} twice; the file is damaged")
            kind = self._scalar("<I", f"the type of key {key}")
            metadata[key] = self._value(kind, f"the value of key {key}", 0)
        return metadata

    def _value(self, kind: int, what: str, depth: int) -> Any:
        if kind == _STRING:
            return self._bytes(what).decode("utf-8", "replace")
        if kind == _ARRAY:
            return self._array(what, depth + 1)
        if kind not in _SCALARS:
            raise self._error(f"{what} has the unknown type {kind}; the file is damaged or newer than mpillama")
        value = self._scalar(_SCALARS[kind], what)
        return bool(value) if kind == _BOOL else value

    def _array(self, what: str, depth: int) -> Any:
        if depth > _MAX_DEPTH:
            raise self._error(f"{what} nests arrays more than {_MAX_DEPTH} deep; the file is damaged")
        kind = self._scalar("<I", what)
        count = self._scalar("<Q", what)
        if kind == _STRING:
            return self._strings(count, what)
        if kind == _ARRAY:
            self._claim(count * 12, what)
            return [self._array(what, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise self._error(f"{what} has the unknown type {kind}; the file is damaged or newer than mpillama")
        dtype = np.dtype(_SCALARS[kind])
        n = count * dtype.itemsize
        self._claim(n, what)
        self._need(n, what)
        values = np.frombuffer(bytes(self._data[self._pos : self._pos + n]), dtype)
        self._pos += n
        return values != 0 if kind == _BOOL else values

    def _claim(self, n: int, what: str) -> None:
        """Refuse a length that the rest of the file cannot hold, before anything is made of it."""
        if n > self._size - self._pos:
            raise self._error(f"{what} is longer than the rest of the file; the file is truncated or damaged")

    def _strings(self, count: int, what: str) -> Strings:
        self._claim(count * 8, what)
        start, pos, size = self._pos, self._pos, self._size
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if pos + 8 > len(self._data):
                self._pos = pos
                self._need(8, what)
            pos += 8 + unpack(self._data, pos)[0]
            if pos > size:
                raise self._error(f"ends inside {what}; the file is truncated or damaged, copy it again")
        self._pos = start
        self._need(pos - start, what)
        self._pos = pos
        return Strings(bytes(self._data[start:pos]), count)

    def _tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        found: dict[str, TensorInfo] = {}
        for i in range(n_tensors):
            info = self._tensor(f"the entry of tensor {i + 1} of {n_tensors}", alignment)
            if info.name in found:
                raise self._error(f"has tensor {info.name} twice; the file is damaged")
            found[info.name] = info
        start = -(-self._pos // alignment) * alignment
        placed = {name: replace(info, offset=start + info.offset) for name, info in found.items()}
        missing = max((info.offset + info.nbytes for info in placed.values()), default=0) - self._size
        if missing > 0:
            raise self._error(f"is truncated: {missing} bytes of its tensors are missing; copy or download it again")
        by_offset = sorted(placed.values(), key=lambda info: info.offset)
        for one, two in zip(by_offset, by_offset[1:], strict=False):
            if one.offset + one.nbytes > two.offset:
                raise self._error(f"tensors {one.name} and {two.name} overlap; the file is damaged")
        return {info.name: info for info in by_offset}

    def _tensor(self, what: str, alignment: int) -> TensorInfo:
        name = self._name(what)
        n_dims = self._scalar("<I", what)
        if not 1 <= n_dims <= 4:
            raise self._error(f"tensor {name} has {n_dims} dimensions; it must have 1 to 4")
        shape = tuple(self._scalar("<Q", what) for _ in range(n_dims))
        number = self._scalar("<I", what)
        offset = self._scalar("<Q", what)
        try:
            kind = GGMLType(number)
        except ValueError:
            raise self._error(f"tensor {name} has type {number}, which mpillama does not know") from None
        if 0 in shape:
            raise self._error(f"tensor {name} has a dimension of 0; the file is damaged")
        if shape[0] % kind.block_size:
            raise self._error(f"tensor {name} has rows of {shape[0]}, not a multiple of {kind.name}'s {kind.block_size}")
        if offset % alignment:
            raise self._error(f"tensor {name} starts at {offset}, not a multiple of the alignment {alignment}")
        info = TensorInfo(name, kind, shape, self._part, offset)
        if prod(shape) > 1 << 60 or offset + info.nbytes > 1 << 62:
            raise self._error(f"tensor {name} claims to be larger than any file; the file is damaged")
        return info
