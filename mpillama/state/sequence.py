"""Saving and restoring a sequence's KV, each rank its own heads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpillama.backends.base import KV_BLOCK
from mpillama.backends.kv_codec import decode, encode
from mpillama.comm.base import Team
from mpillama.engine.engine import Engine
from mpillama.errors import UserError
from mpillama.runner import Runner
from mpillama.sharding import Sharding
from mpillama.state.file import (
    Header,
    KVShape,
    damaged,
    new_digest,
    read_state,
    temporary,
    tokens_chunk,
)
from mpillama.steps import Leader

# KV blocks that pass through memory as floats at a time.
_PIECE = 64


@dataclass(frozen=True)
class KVPlace:
    """What a rank holds of the KV: heads of some blocks of the model; those it owns are held by no rank before it."""

    layers: range
    held: range
    owned: range

    @classmethod
    def of(cls, sharding: Sharding, index: int, n_k: int) -> KVPlace:
        """Return the place of a rank in its stage; keys have ``n_k`` elements."""
        cut = sharding.cuts["k"]
        held, owned = (range(a // n_k, b // n_k) for a, b in (cut.ranges[index], cut.owned[index]))
        return cls(sharding.blocks, held, owned)


class States:
    """Rank 0's way to files of KV, between two steps of an engine.

    Args:
        leader: of all ranks.
        engine: whose prefix cache sequences are taken from, and put into.
        shape: of the model's KV.
        places: what each rank holds.
    """

    def __init__(self, leader: Leader, engine: Engine, shape: KVShape, places: Sequence[KVPlace]) -> None:
        self._leader, self._engine, self._shape, self._places = leader, engine, shape, tuple(places)

    def save(self, path: str | os.PathLike[str], tokens: Sequence[int]) -> int:
        """Save the KV of the beginning of a sequence, as far as it is in the prefix cache; replaces the file at once.

        Returns:
            How many tokens: a multiple of the block size. If there are none, nothing is written.

        Raises:
            UserError: the file cannot be written; what it held before is still there.
        """
        blocks = self._engine.cached_blocks(tokens)
        if not blocks:
            return 0
        own = list(tokens[: len(blocks) * KV_BLOCK])
        header, first, new = Header.new(self._shape, len(own)), tokens_chunk(own), temporary(path)
        try:
            with open(new, "xb") as file:
                file.truncate(header.nbytes)
                task = _Save(str(new), header, self._places, np.array(blocks, np.int64))
                digests = {0: new_digest(first).hexdigest()}
                for found in self._leader.everywhere(task):
                    digests |= found
                file.write(header.with_digests([digests[i] for i in range(len(header.digests))]).pack())
                file.write(first)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)
            _sync_folder(Path(path))
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from error
        finally:
            new.unlink(missing_ok=True)
        return len(own)

    def tokens(self, path: str | os.PathLike[str]) -> list[int]:
        """Return the tokens of a saved sequence; UserError as for `load`."""
        return read_state(path, self._shape)[1]

    def load(self, path: str | os.PathLike[str], prompt: Sequence[int] | None = None) -> int:
        """Put a saved sequence into the prefix cache, or as much of it as begins like ``prompt``.

        Returns:
            How many tokens are in the cache now: a multiple of the block size, and no more than there is room for.

        Raises:
            UserError: the file is damaged, or does not belong to the model; nothing of it is used then.
        """
        header, tokens = read_state(path, self._shape)
        if prompt is not None:
            n = next((i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b), len(prompt))
            tokens = tokens[: n // KV_BLOCK * KV_BLOCK]

        def fill(first: int, blocks: list[int]) -> None:
            self._leader.everywhere(_Load(str(path), header, self._places, first, np.array(blocks, np.int64)))

        return self._engine.adopt(tokens, fill)


def _sync_folder(path: Path) -> None:
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _reason(path: str, error: OSError) -> UserError:
    hint = "; it must lie where all ranks see it" if isinstance(error, FileNotFoundError) else ""
    return UserError(f"{path}: {error.strerror}{hint}")


@dataclass(frozen=True)
class _Save:
    """Writes the heads that a rank owns into a file that is there already; returns the digests of their chunks."""

    path: str
    header: Header
    places: tuple[KVPlace, ...]
    blocks: np.ndarray

    def __call__(self, world: Team, runner: Runner) -> dict[int, str]:
        place = self.places[world.rank]
        if not place.owned:
            return {}
        try:
            fd = os.open(self.path, os.O_WRONLY)
            try:
                digests: dict[int, str] = {}
                for il in place.layers:
                    digests |= self._write_layer(fd, runner, il, place.held, place.owned)
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            raise _reason(self.path, error) from error
        return digests

    def _write_layer(self, fd: int, runner: Runner, il: int, held: range, owned: range) -> dict[int, str]:
        header, kinds = self.header, (("k", runner.type_k), ("v", runner.type_v))
        digests = {(kind, head): new_digest() for kind, _ in kinds for head in owned}
        for start in range(0, len(self.blocks), _PIECE):
            numbers = runner.read_kv(il, self.blocks[start : start + _PIECE])
            for (kind, type), x in zip(kinds, numbers, strict=True):
                for head in owned:
                    raw = encode(x[:, :, head - held.start], type).tobytes()
                    digests[kind, head].update(raw)
                    _, offset, _ = header.chunk(il, kind, head)
                    _write(fd, raw, offset + start * KV_BLOCK * header.row_bytes(kind))
        found = {}
        for (kind, head), digest in digests.items():
            number, _, nbytes = header.chunk(il, kind, head)
            digest.update(bytes(nbytes - header.n_tokens * header.row_bytes(kind)))
            found[number] = digest.hexdigest()
        return found


@dataclass(frozen=True)
class _Load:
    """Reads the heads that a rank holds, all of each chunk to check it, and keeps the blocks from ``first`` on."""

    path: str
    header: Header
    places: tuple[KVPlace, ...]
    first: int
    blocks: np.ndarray

    def __call__(self, world: Team, runner: Runner) -> None:
        place = self.places[world.rank]
        try:
            fd = os.open(self.path, os.O_RDONLY)
            try:
                for il in place.layers if place.held else ():
                    self._read_layer(fd, runner, il, place.held)
            finally:
                os.close(fd)
        except OSError as error:
            raise _reason(self.path, error) from error

    def _read_layer(self, fd: int, runner: Runner, il: int, held: range) -> None:
        header = self.header
        digests = {(kind, head): new_digest() for kind in "kv" for head in held}
        for start in range(0, header.n_tokens // KV_BLOCK, _PIECE):
            stop = min(start + _PIECE, header.n_tokens // KV_BLOCK)
            wanted = slice(max(start, self.first), min(stop, self.first + len(self.blocks)))
            parts: dict[str, list[np.ndarray]] = {"k": [], "v": []}
            for (kind, head), digest in digests.items():
                _, offset, _ = header.chunk(il, kind, head)
                width = KV_BLOCK * header.row_bytes(kind)
                raw = self._read(fd, (stop - start) * width, offset + start * width)
                digest.update(raw)
                if wanted.start < wanted.stop:
                    rows = np.frombuffer(raw, np.uint8).reshape(stop - start, KV_BLOCK, -1)
                    type = runner.type_k if kind == "k" else runner.type_v
                    parts[kind].append(decode(rows[wanted.start - start : wanted.stop - start], type))
            if wanted.start < wanted.stop:
                blocks = self.blocks[wanted.start - self.first : wanted.stop - self.first]
                runner.write_kv(il, blocks, np.stack(parts["k"], axis=2), np.stack(parts["v"], axis=2))
        for (kind, head), digest in digests.items():
            number, offset, nbytes = header.chunk(il, kind, head)
            at = header.n_tokens * header.row_bytes(kind)
            digest.update(self._read(fd, nbytes - at, offset + at))
            if digest.hexdigest() != header.digests[number]:
                name = "keys" if kind == "k" else "values"
                raise damaged(self.path, f"the {name} of block {il}, head {head} do not have their digest")

    def _read(self, fd: int, n: int, offset: int) -> bytes:
        parts, done = [], 0
        while done < n:
            parts.append(os.pread(fd, n - done, offset + done))
            if not parts[-1]:
                raise damaged(self.path, "it has become shorter")
            done += len(parts[-1])
        return b"".join(parts)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        n = os.pwrite(fd, view, offset)
        view, offset = view[n:], offset + n
