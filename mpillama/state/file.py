"""The file of one sequence's KV.

A head (magic, version, size and digest of what follows), a header in JSON, then chunks: the tokens (int32), and for
each block of the model the keys and then the values of each KV head, all tokens of it. Chunks begin at multiples of
4096 bytes, so that ranks that write side by side never share a page of that size; each has a digest, which covers the
zeros after it too.
All numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpillama.backends.base import KV_BLOCK
from mpillama.backends.kv_codec import row_bytes
from mpillama.errors import UserError

VERSION = 1
_MAGIC = b"mpillama"
_HEAD = struct.Struct("<8sII16s")
_ALIGN = 4096
_DIGEST_BYTES = 16
_MAX_HEADER = 64 << 20


@dataclass(frozen=True)
class KVShape:
    """What a file's KV must be to fit a model.

    Attributes:
        identity: of the model.
        type_k: of cached keys.
        type_v: of cached values.
        n_layer: blocks of the model.
        n_head_kv: KV heads of each.
        n_k: elements of a key.
        n_v: elements of a value.
    """

    identity: str
    type_k: str
    type_v: str
    n_layer: int
    n_head_kv: int
    n_k: int
    n_v: int


@dataclass(frozen=True)
class Header:
    """Where everything lies in a file; ``digests`` are those of the chunks, in order."""

    shape: KVShape
    n_tokens: int
    digests: tuple[str, ...]

    @classmethod
    def new(cls, shape: KVShape, n_tokens: int) -> Header:
        """Return a header whose digests are not known yet."""
        n_chunks = 1 + 2 * shape.n_layer * shape.n_head_kv
        return cls(shape, n_tokens, ("0" * 2 * _DIGEST_BYTES,) * n_chunks)

    def with_digests(self, digests: Sequence[str]) -> Header:
        """Return the header with the digests of all chunks."""
        return replace(self, digests=tuple(digests))

    def pack(self) -> bytes:
        """Return head and header, with zeros up to the first chunk."""
        body = {**asdict(self.shape), "n_tokens": self.n_tokens, "digests": self.digests}
        text = json.dumps(body).encode()
        head = _HEAD.pack(_MAGIC, VERSION, len(text), new_digest(text).digest())
        return (head + text).ljust(_aligned(len(head) + len(text)), b"\0")

    def row_bytes(self, kind: str) -> int:
        """Return the bytes of one token's ``k`` or ``v`` of one head."""
        shape = self.shape
        return row_bytes(shape.type_k, shape.n_k) if kind == "k" else row_bytes(shape.type_v, shape.n_v)

    def chunk(self, il: int, kind: str, head: int) -> tuple[int, int, int]:
        """Return the number of a chunk, its offset in the file and its bytes, zeros at its end included."""
        n_heads, k, v = self.shape.n_head_kv, self._padded("k"), self._padded("v")
        first = self.tokens_at + _aligned(4 * self.n_tokens) + il * n_heads * (k + v)
        if kind == "k":
            return 1 + 2 * il * n_heads + head, first + head * k, k
        return 1 + (2 * il + 1) * n_heads + head, first + n_heads * k + head * v, v

    def _padded(self, kind: str) -> int:
        return _aligned(self.n_tokens * self.row_bytes(kind))

    @cached_property
    def tokens_at(self) -> int:
        """Offset of the tokens."""
        return len(self.pack())

    @property
    def nbytes(self) -> int:
        """Bytes of the whole file."""
        _, offset, nbytes = self.chunk(self.shape.n_layer - 1, "v", self.shape.n_head_kv - 1)
        return offset + nbytes


def _aligned(n: int) -> int:
    return -(-n // _ALIGN) * _ALIGN


def new_digest(data: bytes = b"") -> Any:
    """Return a digest as this format uses it."""
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES)


def tokens_chunk(tokens: Sequence[int]) -> bytes:
    """Return the chunk of the tokens."""
    data = np.array(tokens, "<i4").tobytes()
    return data.ljust(_aligned(len(data)), b"\0")


def damaged(path: str | os.PathLike[str], what: str) -> UserError:
    """Return the error of a file whose bytes are not what was written."""
    return UserError(f"{path}: {what}; the file is damaged: delete it, or name another one")


def read_state(path: str | os.PathLike[str], shape: KVShape) -> tuple[Header, list[int]]:
    """Read and check a file's header and tokens.

    Raises:
        UserError: it is no such file, damaged, or of another model, KV type or version.
    """
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(path, file.read(_HEAD.size), file.read, size, shape)
            file.seek(header.tokens_at)
            data = file.read(_aligned(4 * header.n_tokens))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    if new_digest(data).hexdigest() != header.digests[0]:
        raise damaged(path, "its tokens do not have the digest of what was saved")
    return header, np.frombuffer(data, "<i4", header.n_tokens).tolist()


def _read_header(path: str | os.PathLike[str], head: bytes, read: Any, size: int, shape: KVShape) -> Header:
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise UserError(f"{path}: is no saved state of mpillama; name another file")
    _, version, n_bytes, digest = _HEAD.unpack(head)
    if version != VERSION:
        raise UserError(f"{path}: has version {version}, and this mpillama reads version {VERSION}; delete it")
    text = read(n_bytes) if n_bytes <= min(size, _MAX_HEADER) else b""
    if len(text) != n_bytes or new_digest(text).digest() != digest:
        raise damaged(path, "its header does not have the digest of what was saved")
    # The digest vouches for the text, but not for who has written it.
    try:
        body = json.loads(text)
        n_tokens, digests = int(body.pop("n_tokens")), tuple(map(str, body.pop("digests")))
        found = KVShape(**body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged(path, "its header cannot be understood") from None
    for name, text_of in (("identity", "another model"), ("type_k", "other keys"), ("type_v", "other values")):
        if getattr(found, name) != getattr(shape, name):
            kind = "" if name == "identity" else f" ({getattr(found, name)}, here {getattr(shape, name)})"
            raise UserError(f"{path}: was saved with {text_of}{kind}; name another file, or delete this one")
    header = Header(found, n_tokens, digests)
    n_chunks = 1 + 2 * shape.n_layer * shape.n_head_kv
    if found != shape or n_tokens < KV_BLOCK or n_tokens % KV_BLOCK or n_tokens > 1 << 31 or len(digests) != n_chunks:
        raise damaged(path, "its header does not fit together")
    if any(len(digest) != 2 * _DIGEST_BYTES for digest in digests):
        raise damaged(path, "its header does not fit together")
    if header.nbytes != size:
        raise damaged(path, f"it has {size} bytes, not {header.nbytes}")
    # The zeros after the header are no part of any chunk.
    packed = header.pack()
    if head + text + read(max(0, len(packed) - len(head) - n_bytes)) != packed:
        raise damaged(path, "its header is not as it was written")
    return header


def temporary(path: str | os.PathLike[str]) -> Path:
    """Return the name under which a file is written, until it is complete and takes the place of the old one."""
    path = Path(path)
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
