"""Reading a header front to back: every length is compared with the size of the file before it is believed.

Plain reads into a growing buffer, no memory map: a map turns a header into thousands of page faults, which are slow on
the parallel file systems of clusters, and a file that is cut short while it is open into a signal.
"""

from __future__ import annotations

from array import array
from struct import Struct
from typing import Any, BinaryIO

from mpillama.errors import GGUFError

MAX_HEADER_BYTES = 1 << 29
"""Real headers have up to some tens of MB; without a bound, a damaged length could read a whole model into memory."""

# One remote read of a parallel file system; small headers come with one such read.
_READ_BYTES = 1 << 20
_U32 = Struct("<I")
_U64 = Struct("<Q")

AGAIN = "it is truncated or damaged; download or copy it again"


def quoted(text: str) -> str:
    """Return a string from a file in quotes, shortened, with everything that is not printable escaped."""
    return repr(text if len(text) <= 80 else text[:80] + "…")


def printable(path: str) -> str:
    """Return a path for a message of one line, whatever the path is made of."""
    return "".join(c if c.isprintable() else "?" for c in path)


class Cursor:
    """A position in an open file that moves forward over what is read.

    Attributes:
        pos: bytes read so far; the position in the file.
        where: what is being read, for messages.
    """

    def __init__(self, file: BinaryIO, name: str, size: int) -> None:
        self._file, self._name, self._size = file, name, size
        self._buffer = bytearray()
        self.pos = 0
        self.where = "its first bytes"

    @property
    def remaining(self) -> int:
        """Bytes from here to the end of the file."""
        return self._size - self.pos

    def error(self, text: str) -> GGUFError:
        """Return an error that starts with the name of the file."""
        return GGUFError(f"{self._name}: {text}")

    def need(self, n: int) -> None:
        """Load the next ``n`` bytes.

        Raises:
            GGUFError: the file ends before, or the header would be larger than any header is.
        """
        self._load(self.pos + n)

    def _load(self, stop: int) -> None:
        if stop <= len(self._buffer):
            return
        if stop > self._size:
            raise self.error(f"{self.where} goes on to byte {stop}, but the file has {self._size}; {AGAIN}")
        if stop > MAX_HEADER_BYTES:
            raise self.error(f"{self.where} goes on to byte {stop}, further than a header can; the file is damaged")
        self._buffer += self._file.read(max(stop - len(self._buffer), _READ_BYTES))
        if stop > len(self._buffer):
            raise self.error("the file became shorter while it was read; wait until it is complete")

    def need_items(self, count: int, item_bytes: int, items: str) -> None:
        """Check that ``count`` items of at least ``item_bytes`` each can follow, without loading them.

        Raises:
            GGUFError: the file is too short for them.
        """
        if count * item_bytes > self.remaining:
            raise self.error(
                f"{self.where} has {count} {items}, too many for the {self.remaining} bytes left in the file; {AGAIN}"
            )

    def scalar(self, layout: Struct) -> Any:
        """Return one number and move past it."""
        self.need(layout.size)
        (value,) = layout.unpack_from(self._buffer, self.pos)
        self.pos += layout.size
        return value

    def u32(self) -> int:
        """Return an unsigned integer of 4 bytes."""
        value: int = self.scalar(_U32)
        return value

    def u64(self) -> int:
        """Return an unsigned integer of 8 bytes."""
        value: int = self.scalar(_U64)
        return value

    def take(self, n: int) -> bytes:
        """Return the next ``n`` bytes."""
        self.need(n)
        data = bytes(memoryview(self._buffer)[self.pos : self.pos + n])
        self.pos += n
        return data

    def string(self) -> bytes:
        """Return a string: a length of 8 bytes, then that many bytes."""
        n = self.u64()
        self.need_items(n, 1, "bytes of text")
        return self.take(n)

    def name(self, kind: str) -> str:
        """Return a string that names something: not empty, and UTF-8.

        Raises:
            GGUFError: it is neither.
        """
        data = self.string()
        if not data:
            raise self.error(f"{self.where} has an empty {kind}; the file is damaged")
        try:
            return data.decode()
        except UnicodeDecodeError:
            raise self.error(f"{self.where} has a {kind} that is not UTF-8, {data[:40]!r}; {AGAIN}") from None

    def strings(self, count: int) -> tuple[bytes, array[int]]:
        """Return the bytes of ``count`` strings with their lengths, none decoded, and where each one ends in them."""
        began = pos = self.pos
        ends: list[int] = []
        buffer, unpack, append = self._buffer, _U64.unpack_from, ends.append
        # A vocabulary has half a million strings: no calls in the loop while the bytes are there.
        for _ in range(count):
            if pos + 8 > len(buffer):
                self._load(pos + 8)
            pos += 8 + unpack(buffer, pos)[0]
            append(pos - began)
        return self.take(pos - began), array("Q", ends)
