"""Namespaces of options, for those who do not come from a command line."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from mpillama.cli import values
from mpillama.cli.options import Option
from mpillama.errors import UsageError


def default_namespace(options: Iterable[Option]) -> Namespace:
    """Return what a command line without flags gives."""
    return Namespace(**{option.dest: option.default for option in options}, given=frozenset(), notes=[])


def set_options(namespace: Namespace, options: Iterable[Option], given: Mapping[str, tuple[str, Any]]) -> None:
    """Set options as if their flags had been typed.

    Args:
        namespace: to be changed.
        options: of the command.
        given: by dest, what the user calls an option, and its value; None leaves it as it is.

    Raises:
        UsageError: a value that the flag would not take.
    """
    for option in options:
        name, value = given.get(option.dest, ("", None))
        if value is None:
            continue
        try:
            setattr(namespace, option.dest, option.parse(str(value)) if option.parse else bool(value))
        except values.BadValueError as error:
            raise UsageError(f"{name}: {error}") from error
        namespace.given |= {option.dest}
