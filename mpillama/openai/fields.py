"""Reading fields of a JSON object, each checked; null counts as absent, as in OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NoReturn

from mpillama.openai.errors import ApiError, bad

_MAX_DEPTH = 64
_KINDS = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "an array", dict: "an object"}


def parse_json(data: bytes | str) -> Any:
    """Return the value of a JSON text; ApiError if it is none, or nested more deeply than anyone needs."""
    try:
        value = json.loads(data, parse_constant=_no_constant)
    except RecursionError:
        raise bad("the JSON is nested too deeply", code="invalid_json") from None
    except UnicodeDecodeError:
        raise bad("the body is not UTF-8", code="invalid_json") from None
    except ValueError as error:
        raise bad(f"the body is not valid JSON: {error}", code="invalid_json") from None
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, list | dict)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return value
    raise bad(f"the JSON is nested more than {_MAX_DEPTH} levels deep", code="invalid_json")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


def kind_of(value: Any) -> str:
    """Return what a JSON value is, in words."""
    return _KINDS.get(type(value), "null")


class Fields:
    """The fields of an object.

    Args:
        body: the object; ApiError if it is something else.
        path: of the object in the request, for messages.
    """

    def __init__(self, body: Any, path: str = "") -> None:
        if not isinstance(body, Mapping):
            raise bad(f"{path or 'the body'} must be an object, got {kind_of(body)}", path or None)
        self.body, self._path = body, path

    def name(self, field: str) -> str:
        """Return a field's full name."""
        return f"{self._path}.{field}" if self._path else field

    def wrong(self, field: str, expected: str) -> ApiError:
        """Return the error that a field is not what was expected."""
        value = self.body.get(field)
        shown = repr(value) if isinstance(value, str | int | float) and len(repr(value)) < 40 else kind_of(value)
        return bad(f"{self.name(field)} must be {expected}, got {shown}", self.name(field))

    def has(self, field: str) -> bool:
        """Whether a field is there and not null."""
        return self.body.get(field) is not None

    def first(self, *fields: str) -> str:
        """Return the first of these names that is there, else the last."""
        return next((field for field in fields if self.has(field)), fields[-1])

    def any(self, field: str) -> Any:
        """Return a field as it is, None if absent."""
        return self.body.get(field)

    def string(self, field: str, default: str = "") -> str:
        """Return a string."""
        if not self.has(field):
            return default
        value = self.body[field]
        if not isinstance(value, str):
            raise self.wrong(field, "a string")
        return value

    def required_string(self, field: str) -> str:
        """Return a string that must be there and not be empty."""
        if not self.string(field):
            raise bad(f"{self.name(field)} is missing", self.name(field))
        return self.string(field)

    def boolean(self, field: str, default: bool = False) -> bool:
        """Return a boolean."""
        if not self.has(field):
            return default
        value = self.body[field]
        if not isinstance(value, bool):
            raise self.wrong(field, "a boolean")
        return value

    def number(self, field: str, default: float) -> float:
        """Return a number."""
        if not self.has(field):
            return default
        value = self.body[field]
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(field, "a number")
        try:
            return float(value)
        except OverflowError:
            raise self.wrong(field, "a number within the range of floats") from None

    def integer(self, field: str, default: int, low: int = -(2**31), high: int = 2**31 - 1) -> int:
        """Return an integer in ``low..high``; 5.0 is one too, as JavaScript has no other."""
        if not self.has(field):
            return default
        value = self.body[field]
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.wrong(field, "an integer")
        if not low <= value <= high:
            raise self.wrong(field, f"an integer from {low} to {high}")
        return value

    def choice(self, field: str, *allowed: str) -> str:
        """Return one of some words; the first is the default."""
        value = self.string(field, allowed[0])
        if value not in allowed:
            raise self.wrong(field, f"one of {', '.join(allowed)}")
        return value

    def array(self, field: str) -> list[Any]:
        """Return an array, empty if absent."""
        if not self.has(field):
            return []
        value = self.body[field]
        if not isinstance(value, list):
            raise self.wrong(field, "an array")
        return value

    def strings(self, field: str) -> tuple[str, ...]:
        """Return an array of strings, or a string alone as one."""
        if isinstance(self.body.get(field), str):
            return (self.body[field],)
        values = self.array(field)
        if not all(isinstance(value, str) for value in values):
            raise self.wrong(field, "a string or an array of strings")
        return tuple(values)

    def object(self, field: str) -> Fields:
        """Return an object, without fields if absent."""
        return Fields(self.body[field] if self.has(field) else {}, self.name(field))

    def objects(self, field: str) -> list[Fields]:
        """Return an array of objects."""
        return [Fields(value, f"{self.name(field)}[{i}]") for i, value in enumerate(self.array(field))]
