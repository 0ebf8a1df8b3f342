"""Values of flags: text as typed, checked and converted.

Every parser takes the text of one value and returns it converted, or raises :class:`BadValueError` with a message that
says what was expected; the caller puts the flag (or the environment variable) in front.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

INT32_MAX = 2**31 - 1
RANDOM_SEED = 2**32 - 1
"""The seed with which llama.cpp asks for a random one; -1 is the same number in 32 bits."""

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_TRUE = ("on", "enabled", "true", "1")
_FALSE = ("off", "disabled", "false", "0")


class BadValueError(ValueError):
    """A value that a flag cannot take; the message says what is expected, but not for which flag."""


def integer(low: int = -INT32_MAX - 1, high: int = INT32_MAX) -> Callable[[str], int]:
    """Return a parser of integers in ``low..high`` (the default is llama.cpp's int32_t)."""
    if high < INT32_MAX or low == -INT32_MAX - 1:
        expected = f"an integer from {low} to {high}" if high < INT32_MAX else "an integer"
    else:
        expected = f"an integer of at least {low}"

    def parse(text: str) -> int:
        if not _INTEGER.fullmatch(text) or not low <= int(text) <= high:
            raise BadValueError(f"expected {expected}, got {text!r}")
        return int(text)

    return parse


def number(text: str) -> float:
    """Parse a finite decimal number."""
    if not _NUMBER.fullmatch(text) or not math.isfinite(float(text)):
        raise BadValueError(f"expected a number, got {text!r}")
    return float(text)


def positive(text: str) -> float:
    """Parse a number greater than zero."""
    value = number(text)
    if value <= 0:
        raise BadValueError(f"expected a number greater than 0, got {text!r}")
    return value


def seconds(text: str) -> float:
    """Parse a time of at least 0."""
    value = number(text)
    if not 0 <= value < float("inf"):
        raise BadValueError(f"expected a number of seconds of at least 0, got {text!r}")
    return value


def reciprocal(text: str) -> float:
    """Parse ``--rope-scale N``, which is ``--rope-freq-scale 1/N``."""
    return 1.0 / positive(text)


def seed(text: str) -> int:
    """Parse a 32-bit seed; -1 and 4294967295 both ask for a random one and give -1."""
    if not _INTEGER.fullmatch(text) or not -1 <= int(text) <= RANDOM_SEED:
        raise BadValueError(f"expected an integer from -1 (random) to {RANDOM_SEED}, got {text!r}")
    return -1 if int(text) == RANDOM_SEED else int(text)


def boolean(text: str) -> bool:
    """Parse the value of a switch's environment variable, in the words that llama.cpp takes."""
    if text in _TRUE:
        return True
    if text in _FALSE:
        return False
    raise BadValueError(f"expected one of {', '.join(_TRUE + _FALSE)}, got {text!r}")


def choice(*allowed: str, later: tuple[str, ...] = ()) -> Callable[[str], str]:
    """Return a parser of one of ``allowed``; words in ``later`` are llama.cpp's but not supported yet."""
    words = " or ".join(filter(None, (", ".join(allowed[:-1]), allowed[-1])))

    def parse(text: str) -> str:
        if text in later:
            raise BadValueError(f"{text!r} is not supported yet; use {words}")
        if text not in allowed:
            raise BadValueError(f"expected {words}, got {text!r}")
        return text

    return parse


def list_of(parse: Callable[[str], str]) -> Callable[[str], str]:
    """Return a parser of a list of what ``parse`` takes, separated by commas; its value is such a text again."""
    return lambda text: ",".join(parse(part.strip()) for part in text.split(","))


def device(text: str) -> str:
    """Parse the name of a device: ``cpu`` or ``none``, ``cuda:0``, ``hip:0``, and llama.cpp's ``CUDA0`` and ``ROCm0``.

    A GPU without a number is any that no other rank has.
    """
    name = text.lower()
    if name in ("cpu", "none"):
        return "cpu"
    match = re.fullmatch(r"(cuda|hip|rocm)(?::?([0-9]{1,4}))?", name)
    if match is None:
        raise BadValueError(f"expected devices like cpu,cuda:0,cuda:1 or hip:0, got {text!r}; see --list-devices")
    kind = "cuda" if match[1] == "cuda" else "hip"
    return f"{kind}:{int(match[2])}" if match[2] else kind


def path(text: str) -> Path:
    """Parse a file name; whether the file exists is found out by whoever opens it."""
    if not text or "\0" in text:
        raise BadValueError(f"expected a file name, got {text!r}")
    return Path(text)


def one(text: str) -> tuple[str]:
    """Parse one occurrence of a repeatable flag with a plain text value."""
    return (text,)


def proportions(text: str) -> tuple[float, ...]:
    """Parse ``3,1`` or ``3/1``: one share per rank, zero allowed but not for all."""
    problem = f"expected one non-negative number per rank, like 3,1, got {text!r}"
    try:
        shares = tuple(number(part) for part in re.split(r"[,/]+", text))
    except BadValueError as error:
        raise BadValueError(problem) from error
    if min(shares) < 0 or sum(shares) <= 0:
        raise BadValueError(problem)
    return shares


def shares(text: str) -> tuple[float, ...] | str:
    """Parse `proportions`, or one of the words ``auto`` and ``memory``."""
    return text if text in ("auto", "memory") else proportions(text)


def token_ids(text: str) -> tuple[int, ...]:
    """Parse token ids separated by commas or white space."""
    parts = [part for part in re.split(r"[,\s]+", text) if part]
    if not parts or not all(re.fullmatch(r"[0-9]+", part) and int(part) <= INT32_MAX for part in parts):
        shown = text if len(text) <= 40 else text[:40] + "…"
        raise BadValueError(f"expected token ids like 1,15043,29991, got {shown!r}")
    return tuple(int(part) for part in parts)


def kv_overrides(text: str) -> tuple[tuple[str, int | float | bool | str], ...]:
    """Parse ``KEY=TYPE:VALUE[,KEY=TYPE:VALUE…]``, TYPE one of int, float, bool, str, into pairs of key and value.

    An item that holds a comma is put in double quotes, with quotes inside it doubled.
    """
    return tuple(_kv_override(item) for item in _csv(text))


def _kv_override(item: str) -> tuple[str, Any]:
    key, equals, typed = item.partition("=")
    kind, colon, value = typed.partition(":")
    if not (key and equals and colon):
        raise BadValueError(f"expected KEY=TYPE:VALUE with TYPE int, float, bool or str, got {item!r}")
    parsers: dict[str, Callable[[str], Any]] = {
        "int": integer(-(2**63), 2**63 - 1),
        "float": number,
        "bool": lambda word: choice("true", "false")(word) == "true",
        "str": str,
    }
    if kind not in parsers:
        raise BadValueError(f"expected TYPE int, float, bool or str in KEY=TYPE:VALUE, got {item!r}")
    return key, parsers[kind](value)


def _csv(text: str) -> list[str]:
    """Split one row of comma-separated values."""
    try:
        return next(csv.reader([text])) or [""]
    except csv.Error as error:
        raise BadValueError(f"expected KEY=TYPE:VALUE,..., got {text!r}") from error


def unescape(text: str) -> str:
    r"""Replace the escapes that llama.cpp replaces in prompts: ``\n \r \t \' \" \\ \xHH``; others stay as they are.

    ``\xHH`` is a byte, so ``\xe2\x82\xac`` is one character. Raises BadValueError if the bytes are not UTF-8.
    """
    simple = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"'": b"'", b'"': b'"', b"\\": b"\\"}

    def replace(match: re.Match[bytes]) -> bytes:
        code = match[1]
        return bytes([int(code[1:], 16)]) if len(code) == 3 else simple[code]

    data = re.sub(rb"\\(x[0-9a-fA-F]{2}|[nrt'\"\\])", replace, text.encode("utf-8", "surrogateescape"))
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadValueError(
            f"not valid UTF-8 (byte 0x{data[error.start]:02x}); --no-escape keeps backslashes"
        ) from error
