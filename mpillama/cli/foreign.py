"""What is done with llama.cpp's flags, variables and programs that mpillama does not have; see `foreign_tables`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from mpillama.backends import GPU_NAMES
from mpillama.cli import values
from mpillama.cli.foreign_tables import ACCEPTED, IGNORED, UNSUPPORTED

# What an optional value is, to tell it from a word that follows a bare flag.
_SWITCH = frozenset(("on", "enabled", "true", "1", "off", "disabled", "false", "0", "auto", "-1"))
_GPU_FLAGS = ("-ngl", "-mg")


@dataclass(frozen=True)
class ForeignFlag:
    """A flag of llama.cpp that is not mpillama's.

    Attributes:
        names: all of them.
        metavars: a word for each value that follows it.
        variables: that stand for it.
        ignored: whether it is harmless.
        remark: why it has no effect, or what to do instead; may be "".
    """

    names: tuple[str, ...]
    metavars: tuple[str, ...]
    variables: tuple[str, ...]
    ignored: bool
    remark: str

    @property
    def arity(self) -> int:
        """How many values follow it."""
        return len(self.metavars)

    def may_lack(self, word: str | None) -> bool:
        """Whether its value may be left out, and ``word``, which follows it, is not one."""
        optional = bool(self.metavars) and self.metavars[0].startswith("[")
        return optional and not (word and set(word.split(",")) <= _SWITCH)

    def check(self, value: str) -> None:
        """Raise ``values.BadValueError`` if ``value`` asks for something else than what is done anyway."""
        if self.metavars[0].startswith("{"):
            try:
                values.list_of(values.choice(*self.metavars[0].strip("{}").split("|")))(value)
            except values.BadValueError as error:
                raise values.BadValueError(f"{error}: {self.remark}") from None


def foreign_flags(command: str) -> dict[str, ForeignFlag]:
    """Return llama.cpp's flags, by each of their names, as a command treats them."""
    tables = ((UNSUPPORTED, False), (IGNORED, True), (ACCEPTED.get(command, ""), True))
    return {name: flag for table, ignored in tables for flag in _read(table, ignored) for name in flag.names}


def accepting_command(name: str) -> str:
    """Return the command that accepts a flag which others do not know; "" if there is none."""
    flags = ((command, flag) for command, table in ACCEPTED.items() for flag in _read(table, True))
    return next((command for command, flag in flags if name in flag.names), "")


def _read(table: str, ignored: bool) -> Iterator[ForeignFlag]:
    for paragraph in table.strip().split("\n\n"):
        shared = ""
        for line in paragraph.splitlines():
            text, _, remark = line.partition("| ") if line.startswith("| ") else line.partition(" | ")
            if not text:
                shared = remark
                continue
            words = text.split()
            names = tuple(word for word in words if word.startswith("-"))
            variables = tuple("LLAMA_ARG_" + word[1:] for word in words if word.startswith("$"))
            metavars = tuple(words[len(names) : len(words) - len(variables)])
            yield ForeignFlag(names, metavars, variables, ignored, remark or shared)


def refusal(name: str, flag: ForeignFlag) -> str:
    """Return what is said where a flag is refused."""
    hint = f": {flag.remark}" if flag.remark else " yet"
    return f"{name} is a llama.cpp flag that mpillama does not support{hint}"


def note(source: str, flag: ForeignFlag, value: str, namespace: Namespace) -> str:
    """Return what is said where a flag or a variable, ``source``, has no effect."""
    # -ngl 0 asks for what is done without a GPU, and where one is named there is nothing to tell.
    plain = flag.names[0] in _GPU_FLAGS and (value == "0" or not _leaves_gpus_alone(namespace))
    return f"{source} has no effect in mpillama" + (f": {flag.remark}" if flag.remark and not plain else "")


def environment_notes(command: str, environ: Mapping[str, str], namespace: Namespace) -> list[str]:
    """Return a note for each variable that is set and has no effect; an empty one counts as unset."""
    flags = dict.fromkeys(foreign_flags(command).values())
    found = [(name, flag) for flag in flags for name in flag.variables if environ.get(name)]
    return [note(name, flag, environ[name], namespace) for name, flag in found]


def _leaves_gpus_alone(namespace: Namespace) -> bool:
    """Whether a command can compute on GPUs, and none was named."""
    if not hasattr(namespace, "backend"):
        return False
    named = namespace.device or namespace.backend
    return not any(entry.partition(":")[0] in GPU_NAMES for entry in named.split(","))
