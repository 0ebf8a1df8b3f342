"""Metadata values: numbers, strings and arrays (``enum gguf_type`` in gguf.h)."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from struct import Struct
from typing import Any, overload

import numpy as np

from mpillama.gguf.cursor import Cursor

_NUMBERS = {
    0: Struct("<B"),
    1: Struct("<b"),
    2: Struct("<H"),
    3: Struct("<h"),
    4: Struct("<I"),
    5: Struct("<i"),
    6: Struct("<f"),
    10: Struct("<Q"),
    11: Struct("<q"),
    12: Struct("<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_MAX_DEPTH = 4


class StringArray(Sequence[str]):
    """An array of strings, decoded when one of them is first asked for: most runs never look at most vocabularies.

    Bytes that are not UTF-8 become lone surrogates (PEP 383), so that different tokens stay different strings.
    """

    def __init__(self, data: bytes, ends: array[int]) -> None:
        """data: strings with their lengths in 8 bytes each before them; ends: where each ends."""
        self._data, self._ends = data, ends

    @cached_property
    def _strings(self) -> list[str]:
        data, places = self._data, list(pairwise((0, *self._ends)))
        try:
            return [data[start + 8 : end].decode() for start, end in places]
        except UnicodeDecodeError:
            return [data[start + 8 : end].decode("utf-8", "surrogateescape") for start, end in places]

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[str]:
        return iter(self._strings)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        return self._strings[index]

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, StringArray | list | tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._data)

    def __repr__(self) -> str:
        return f"StringArray of {len(self)}"


def read_value(cursor: Cursor) -> Any:
    """Return the value of a key: int, float, bool or str; arrays as numpy arrays, `StringArray` or lists of arrays.

    Raises:
        GGUFError: unknown type, or a length that the file is too short for.
    """
    return _read(cursor, cursor.u32(), 0)


def _read(cursor: Cursor, type: int, depth: int) -> Any:
    if type in _NUMBERS:
        return cursor.scalar(_NUMBERS[type])
    if type == _BOOL:
        # Writers differ in what they store for true.
        return cursor.take(1) != b"\0"
    if type == _STRING:
        return cursor.string().decode("utf-8", "replace")
    if type == _ARRAY:
        return _read_array(cursor, depth + 1)
    raise _unknown(cursor, type)


def _read_array(cursor: Cursor, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise cursor.error(f"{cursor.where} has arrays nested more than {_MAX_DEPTH} deep; the file is damaged")
    type, count = cursor.u32(), cursor.u64()
    if type == _STRING:
        cursor.need_items(count, 8, "strings")
        return StringArray(*cursor.strings(count))
    if type == _ARRAY:
        cursor.need_items(count, 12, "arrays")
        return [_read_array(cursor, depth + 1) for _ in range(count)]
    if type == _BOOL:
        cursor.need_items(count, 1, "items")
        return np.frombuffer(cursor.take(count), np.uint8) != 0
    if type in _NUMBERS:
        layout = _NUMBERS[type]
        cursor.need_items(count, layout.size, "items")
        return np.frombuffer(cursor.take(count * layout.size), layout.format)
    raise _unknown(cursor, type)


def _unknown(cursor: Cursor, type: int) -> Exception:
    return cursor.error(f"{cursor.where} has a value of unknown type {type}; the file is damaged or too new")
