"""What was used last is kept."""

from __future__ import annotations

from typing import Generic, TypeVar

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Recent(Generic[_Key, _Value]):
    """At most ``size`` values by key; what was used least recently goes first."""

    def __init__(self, size: int) -> None:
        self._size = size
        # In the order of their last use.
        self._values: dict[_Key, _Value] = {}

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        """Keep nothing."""
        self._values.clear()

    def get(self, key: _Key) -> _Value | None:
        """Return a value, which counts as a use; None if it is not there."""
        value = self._values.pop(key, None)
        if value is not None:
            self._values[key] = value
        return value

    def put(self, key: _Key, value: _Value) -> None:
        """Keep a value that is not there yet."""
        if len(self._values) >= self._size:
            del self._values[next(iter(self._values))]
        self._values[key] = value
