"""The header of a GGUF model: metadata, and where each tensor lies; of one file or of all parts of a split one.

Follows the specification of GGUF (docs/gguf.md of ggml), versions 2 and 3, little endian. Whatever a file says is
checked against its real size first, so that a damaged file costs neither memory nor time; tensor data are never read.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mpillama.errors import GGUFError
from mpillama.gguf.cursor import AGAIN, Cursor, printable, quoted
from mpillama.gguf.types import REMOVED_TYPES, GGMLType, row_bytes
from mpillama.gguf.values import read_value

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 24
_MAX_DIMS = 4
# The fewest bytes of a key with its value, and of a tensor's description: what is counted has to fit into the file.
_PAIR_BYTES = 8 + 1 + 4 + 1
_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8

# What files are that people take for models, by how they begin.
_NOT_MODELS = {
    b"version https://git-lfs": "is a Git LFS pointer, not the model; run git lfs pull, or download the file itself",
    b"<": "is a web page, not a model; download the file itself",
    b"PK\3\4": "is a zip archive or a PyTorch checkpoint; convert it to GGUF",
    b"ggml": "is older than GGUF; convert the original model to GGUF",
    b"lmgg": "is older than GGUF; convert the original model to GGUF",
    b"fmgg": "is older than GGUF; convert the original model to GGUF",
    b"tjgg": "is older than GGUF; convert the original model to GGUF",
    b"algg": "is a LoRA adapter older than GGUF; convert the original to GGUF",
}

_PART_NAME = re.compile(r".*-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies.

    Attributes:
        shape: in GGUF's order: the in axis (ne0) first, the fastest one.
        part: index into `GGUFHeader.paths`.
        offset: of its first byte, from the start of that file.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    part: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor, without padding."""
        return row_bytes(self.type, self.shape[0]) * math.prod(self.shape[1:])


@dataclass
class GGUFHeader:
    """What a model's files say before the weights.

    Attributes:
        paths: of the parts in order; a single file is one part.
        alignment: of the first part, in bytes.
        metadata: of the first part; see `values.read_value` for the types.
        tensors: of all parts, by name, in the order of the files' descriptions.
        file_bytes: sizes of the parts together.
    """

    paths: tuple[str, ...]
    version: int
    alignment: int
    metadata: Mapping[str, Any]
    tensors: dict[str, TensorInfo]
    file_bytes: int

    def without(self, *prefixes: str) -> GGUFHeader:
        """Return the header without the metadata whose keys have these prefixes: small enough to send around."""
        metadata = {key: value for key, value in self.metadata.items() if not key.startswith(prefixes)}
        return replace(self, metadata=metadata)


def read_header(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read and check a model's header; the first part of a split model opens all of its parts.

    Raises:
        GGUFError: the file is missing, not GGUF, truncated, damaged, or not the first part.
    """
    path = os.fspath(path)
    first = _read_part(path, 0)
    count = _split_number(first, "split.count", 1)
    return first if count <= 1 else _read_parts(first, count)


def _error(path: str, text: str) -> GGUFError:
    return GGUFError(f"{printable(os.path.basename(path) or path)}: {text}")


def _read_parts(first: GGUFHeader, count: int) -> GGUFHeader:
    """Add the other parts, named like the first (`gguf-split` of llama.cpp), to its header."""
    (path,) = first.paths
    folder, name = os.path.split(path)
    numbers = _PART_NAME.fullmatch(name)
    index = _split_number(first, "split.no", None)
    if numbers is None or int(numbers[2]) != count or int(numbers[1]) != index + 1:
        raise _error(
            path,
            f"is part {index + 1} of {count}, but its name does not end in -{index + 1:05}-of-{count:05}.gguf, by "
            "which the other parts are found; give all parts the names that they had",
        )
    names = [f"{name[: numbers.start(1)]}{i + 1:05}{name[numbers.end(1) :]}" for i in range(count)]
    if index != 0:
        raise _error(path, f"is part {index + 1} of {count}; open the first part instead, {printable(names[0])}")

    paths = [os.path.join(folder, part) for part in names]
    for i, part_path in enumerate(paths):
        if not os.path.exists(part_path):
            raise _error(path, f"part {i + 1} of {count} is missing: {printable(part_path)}; download it as well")
    tensors = dict(first.tensors)
    file_bytes = first.file_bytes
    for i, part_path in enumerate(paths[1:], 1):
        part = _read_part(part_path, i)
        says = (_split_number(part, "split.no", None), _split_number(part, "split.count", None))
        if says != (i, count):
            raise _error(
                part_path,
                f"says that it is part {says[0] + 1} of {says[1]}, but is named as part {i + 1} of {count}; "
                "the parts are mixed up or of different models, download them again",
            )
        for info in part.tensors.values():
            twin = tensors.setdefault(info.name, info)
            if twin is not info:
                raise _error(
                    part_path,
                    f"tensor {quoted(info.name)} is also in {printable(names[twin.part])}; "
                    "the parts are of different models, download them again",
                )
        file_bytes += part.file_bytes
    total = _split_number(first, "split.tensors.count", len(tensors))
    if total != len(tensors):
        raise _error(
            path,
            f"its {count} parts have {len(tensors)} tensors, but split.tensors.count is {total}; "
            "the parts are of different models, download them again",
        )
    return replace(first, paths=tuple(paths), tensors=tensors, file_bytes=file_bytes)


def _split_number(header: GGUFHeader, key: str, default: int | None) -> int:
    value = header.metadata.get(key, default)
    if value is None:
        raise _error(header.paths[0], f"has no key {key}, which every part of a split model has; download it again")
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise _error(header.paths[0], f"key {key} is {quoted(str(value))}, not a count; the file is damaged")
    return value


def _read_part(path: str, part: int) -> GGUFHeader:
    """Read one file; its tensors get ``part`` as their part."""
    try:
        status = os.stat(path)
        # Before it is opened: opening a named pipe waits for its other end.
        if stat.S_ISDIR(status.st_mode):
            raise _error(path, "is a directory; give the .gguf file in it")
        if not stat.S_ISREG(status.st_mode):
            raise _error(path, "is not a regular file; a pipe or device cannot be read at many places")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _parse(Cursor(file, printable(os.path.basename(path)), size), path, part, size)
    except FileNotFoundError:
        raise _error(path, f"no such file: {printable(path)}") from None
    except PermissionError:
        raise _error(path, f"no permission to read {printable(path)}") from None
    except OSError as error:
        raise _error(path, f"cannot read {printable(path)}: {error.strerror}") from error
    except ValueError:
        # What the os module raises for a null character.
        raise _error(path, "is not a possible file name") from None


def _parse(cursor: Cursor, path: str, part: int, size: int) -> GGUFHeader:
    _check_magic(cursor, size)
    cursor.where = "the header"
    version = cursor.u32()
    if version not in _VERSIONS:
        raise cursor.error(_why_not(version))
    n_tensors, n_pairs = cursor.u64(), cursor.u64()
    cursor.need_items(n_pairs, _PAIR_BYTES, "keys")
    cursor.need_items(n_tensors, _TENSOR_BYTES, "tensors")

    metadata: dict[str, Any] = {}
    for i in range(n_pairs):
        cursor.where = f"key {i + 1} of {n_pairs}"
        key = cursor.name("key")
        cursor.where = f"key {quoted(key)}"
        if key in metadata:
            raise cursor.error(f"{cursor.where} is there twice; the file is damaged")
        metadata[key] = read_value(cursor)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if (
        isinstance(alignment, bool)
        or not isinstance(alignment, int)
        or not 0 < alignment < _MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        shown = quoted(str(alignment))
        raise cursor.error(f"key general.alignment is {shown}, not a power of two below {_MAX_ALIGNMENT}; {AGAIN}")

    tensors: dict[str, TensorInfo] = {}
    for i in range(n_tensors):
        cursor.where = f"the description of tensor {i + 1} of {n_tensors}"
        info = _read_tensor(cursor, part)
        if info.name in tensors:
            raise cursor.error(f"tensor {quoted(info.name)} is there twice; the file is damaged")
        tensors[info.name] = info
    start = -(-cursor.pos // alignment) * alignment
    tensors = {name: replace(info, offset=start + info.offset) for name, info in tensors.items()}
    _check_places(cursor, list(tensors.values()), alignment, size)
    return GGUFHeader((path,), version, alignment, metadata, tensors, size)


def _check_magic(cursor: Cursor, size: int) -> None:
    if size == 0:
        raise cursor.error("is empty; download or copy it again")
    begins = cursor.take(min(size, 64))
    cursor.pos = 4
    if begins.startswith(b"GGUF"):
        return
    for beginning, what in _NOT_MODELS.items():
        if begins.startswith(beginning):
            raise cursor.error(what)
    if begins[8:10] == b'{"':
        raise cursor.error("is a safetensors file; convert it to GGUF")
    raise cursor.error(f"is not a GGUF file: it begins with {begins[:4]!r} instead of b'GGUF'")


def _why_not(version: int) -> str:
    if int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS:
        return "is a big-endian GGUF file, which mpillama cannot read; download or convert the little-endian one"
    if version == 1:
        return "is GGUF version 1, which is no longer in use; convert the model again, or download a newer file"
    return f"is GGUF version {version}; mpillama reads versions {' and '.join(map(str, _VERSIONS))}"


def _read_tensor(cursor: Cursor, part: int) -> TensorInfo:
    """Read a tensor's description; its offset is still relative to the start of the data."""
    name = cursor.name("tensor name")
    cursor.where = f"the description of tensor {quoted(name)}"
    n_dims = cursor.u32()
    if not 1 <= n_dims <= _MAX_DIMS:
        raise cursor.error(f"tensor {quoted(name)} has {n_dims} dimensions, not 1 to {_MAX_DIMS}; the file is damaged")
    shape = tuple(cursor.u64() for _ in range(n_dims))
    number, offset = cursor.u32(), cursor.u64()
    if math.prod(shape) == 0 or math.prod(shape) >= 1 << 60:
        raise cursor.error(f"tensor {quoted(name)} has the impossible shape {list(shape)}; the file is damaged")
    if number in REMOVED_TYPES:
        raise cursor.error(
            f"tensor {quoted(name)} has type number {number}, which GGUF no longer has; download a newer file"
        )
    try:
        type = GGMLType(number)
    except ValueError:
        raise cursor.error(
            f"tensor {quoted(name)} has type number {number}, which is unknown; the file is damaged or too new"
        ) from None
    if shape[0] % type.block_size:
        raise cursor.error(
            f"tensor {quoted(name)} has rows of {shape[0]} weights, which is no whole number of {type.name} blocks "
            f"of {type.block_size}; the file is damaged"
        )
    return TensorInfo(name, type, shape, part, offset)


def _check_places(cursor: Cursor, tensors: list[TensorInfo], alignment: int, size: int) -> None:
    """Make sure that tensors are aligned, do not overlap, and end within the file."""
    in_order = sorted(tensors, key=lambda info: info.offset)
    for before, info in zip([None, *in_order], in_order, strict=False):
        after = f"after tensor {quoted(before.name)} " if before else ""
        if info.offset % alignment:
            raise cursor.error(
                f"tensor {quoted(info.name)} {after}starts at byte {info.offset}, not at a multiple of "
                f"{alignment}; the file is damaged"
            )
        if before and info.offset < before.offset + before.nbytes:
            raise cursor.error(
                f"tensors {quoted(before.name)} and {quoted(info.name)} overlap at byte {info.offset}; {AGAIN}"
            )
    # Without overlap the last tensor is also the one that ends last.
    end = in_order[-1].offset + in_order[-1].nbytes if in_order else 0
    if end > size:
        n_whole = sum(info.offset + info.nbytes <= size for info in in_order)
        raise cursor.error(
            f"{end - size} bytes are missing at its end: the file has {size} bytes of {end}, and {n_whole} of its "
            f"{len(tensors)} tensors; {AGAIN}"
        )
