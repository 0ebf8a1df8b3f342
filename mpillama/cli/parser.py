"""From argv and environment to a command and its namespace.

argparse holds the namespace and writes the help. It does not read argv, because it cannot read it the way that
llama.cpp does, who takes any word as a value, also one that starts with a dash (``-p "- one"``), and never cuts a
word in two (argparse reads ``-tsx`` as ``-t sx``). Added to llama.cpp's way: ``--flag=value``.

Nothing here prints or exits: errors are UsageError, help and version are HelpRequested.
"""

from __future__ import annotations

import argparse
import difflib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mpillama import __version__
from mpillama.cli import values
from mpillama.cli.commands import COMMANDS, DEFAULT_COMMAND, Command
from mpillama.cli.foreign import ForeignFlag, accepting_command, environment_notes, foreign_flags, note, refusal
from mpillama.cli.foreign_tables import PROGRAMS
from mpillama.cli.namespace import default_namespace
from mpillama.cli.options import Option
from mpillama.errors import UsageError

HELP = ("-h", "--help", "--usage")
VERSION = ("--version",)
DEVICES = ("--list-devices",)


class HelpRequested(Exception):
    """The user asked for a text (help or version) instead of a run; the caller prints it and exits with 0."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> tuple[str, argparse.Namespace]:
    """Return the command's name and a namespace with a value for each of its options.

    ``argv`` comes without the program's name. A flag wins over an environment variable, which wins over the default; an
    empty variable counts as unset. The namespace also holds ``given``, the dests that are no defaults, and ``notes``: a
    line for each flag or variable that does nothing here. Raises UsageError or HelpRequested.
    """
    words = list(argv)
    if not words or words[0] in HELP:
        raise HelpRequested(overview())
    by_name = {command.name: command for command in COMMANDS}
    if words[0] in by_name:
        command = by_name[words.pop(0)]
    elif words[0].startswith("-"):
        command = by_name[DEFAULT_COMMAND]
    else:
        raise UsageError(_unknown_command(words[0], list(by_name)))

    ignored: list[tuple[str, ForeignFlag, str]] = []
    given = _read_flags(command, words, ignored)
    found = {**_read_environment(command, environ, given), **given}
    namespace = default_namespace(command.options)
    for dest, (_, value) in found.items():
        setattr(namespace, dest, value)
    namespace.given = frozenset(found)
    for option in command.options:
        if option.required and option.dest not in found:
            raise UsageError(f"mpillama {command.name} needs {option.long_name} {option.metavar}: {option.help}")
    if getattr(namespace, "escape", False):
        _replace_escapes(command, namespace)
    command.check(namespace)
    namespace.notes = [note(*one, namespace) for one in ignored] + environment_notes(command.name, environ, namespace)
    return command.name, namespace


def find_command(name: str) -> Command:
    """Return the command called ``name``, which must be one that :func:`parse` returned."""
    return next(command for command in COMMANDS if command.name == name)


def _read_flags(
    command: Command, words: Sequence[str], ignored: list[tuple[str, ForeignFlag, str]]
) -> dict[str, tuple[str, Any]]:
    """Return, by dest, what was typed and its value; ignored flags and their last values are added to ``ignored``."""
    options = {name: option for option in command.options for name in (*option.names, *option.negatives)}
    known: dict[str, Option | ForeignFlag] = {**foreign_flags(command.name), **options}
    given: dict[str, tuple[str, Any]] = {}
    for flag, attached, rest in _flags(words, known):
        if flag in HELP:
            raise HelpRequested(command_help(command))
        if flag in VERSION:
            raise HelpRequested(f"mpillama {__version__}")
        if flag in DEVICES:
            # Not at the top: it needs what help does not.
            from mpillama.cli.devices import device_table

            raise HelpRequested(device_table())
        target = known.get(flag)
        if target is None:
            if flag.startswith("-") or not command.positional:
                raise UsageError(_unknown_flag(flag, command, options, known))
            target, attached = next(o for o in command.options if o.dest == command.positional), flag
        if isinstance(target, ForeignFlag):
            if not target.ignored:
                raise UsageError(refusal(flag, target))
            ignored.append((flag, target, _foreign_value(flag, target, attached, rest, known)))
        elif target.parse is None:
            if attached is not None:
                raise UsageError(f"{flag} is a switch and takes no value, got {attached!r}")
            given[target.dest] = (flag, flag in target.names)
        else:
            value = _convert(target, flag, _value(flag, attached, rest, known, target.metavar))
            if target.dest in given:
                before = given[target.dest]
                if target.repeat:
                    value = before[1] + value
                elif not (flag.startswith("-") and before[0].startswith("-")):
                    raise UsageError(f"{before[0]} and {flag} both give the {target.dest}: give one of them")
            given[target.dest] = (flag, value)
    _check_exclusions(command.options, given)
    return given


def _flags(words: Sequence[str], known: Iterable[str]) -> Iterator[tuple[str, str | None, deque[str]]]:
    """Yield each flag with the value attached by ``=``, if any, and the words that follow, from which values are taken.

    Long flags may be typed with underscores, as in llama.cpp. A bare word is yielded as a flag.
    """
    rest = deque(words)
    while rest:
        word = rest.popleft()
        name, equals, attached = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        if equals and (name in known or name.startswith("--")):
            yield name, attached, rest
        else:
            yield (name if not equals else word), None, rest


def _value(flag: str, attached: str | None, rest: deque[str], known: Iterable[str], metavar: str = "value") -> str:
    """Return the value attached to ``flag`` or else the next word, which must not be a flag itself."""
    if attached is not None:
        return attached
    if not rest:
        raise UsageError(f"{flag} needs a value: {flag} {metavar}")
    word = rest.popleft()
    if word in known or word in HELP + VERSION + DEVICES:
        raise UsageError(
            f"{flag} needs a value ({metavar}), but the flag {word} follows; if meant, write {flag}={word}"
        )
    return word


def _foreign_value(
    flag: str, foreign: ForeignFlag, attached: str | None, rest: deque[str], known: Iterable[str]
) -> str:
    """Return the last value of an ignored flag, "" if it has none; all of them are taken from ``rest``."""
    if attached is None and foreign.may_lack(rest[0] if rest else None):
        return ""
    for _ in foreign.metavars:
        attached = _value(flag, attached, rest, known)
        try:
            foreign.check(attached)
        except values.BadValueError as error:
            raise UsageError(f"{flag}: {error}") from error
    return attached or ""


def _convert(option: Option, source: str, text: str) -> Any:
    """Return the value of ``text``, or raise a UsageError that names ``source``, a flag or an environment variable."""
    try:
        return option.parse(text) if option.parse else values.boolean(text)
    except values.BadValueError as error:
        raise UsageError(f"{source}: {error}") from error


def _read_environment(
    command: Command, environ: Mapping[str, str], given: Mapping[str, tuple[str, Any]]
) -> dict[str, tuple[str, Any]]:
    """Return, by dest, variable and value of the options that have a variable set and were not ruled out by a flag."""
    found: dict[str, tuple[str, Any]] = {}
    for option in command.options:
        if option.dest in given or any(dest in given for dest in option.excludes):
            continue
        if option.negative_env and environ.get(option.negative_env):
            found[option.dest] = (option.negative_env, False)
        elif option.env and environ.get(option.env):
            found[option.dest] = (option.env, _convert(option, option.env, environ[option.env]))
    _check_exclusions(command.options, found)
    return found


def _check_exclusions(options: Sequence[Option], found: Mapping[str, tuple[str, Any]]) -> None:
    for option in options:
        for dest in option.excludes:
            if option.dest in found and dest in found:
                raise UsageError(f"{found[option.dest][0]} and {found[dest][0]} exclude each other: give one of them")


def _replace_escapes(command: Command, namespace: argparse.Namespace) -> None:
    """Replace escapes in the values of the flags that hold prompts and stop strings."""
    for option in command.options:
        value = getattr(namespace, option.dest)
        if not option.escapes or value is None:
            continue
        try:
            replaced = tuple(map(values.unescape, value)) if option.repeat else values.unescape(value)
        except values.BadValueError as error:
            raise UsageError(f"{option.long_name}: {error}") from error
        setattr(namespace, option.dest, replaced)


def _unknown_command(word: str, names: list[str]) -> str:
    program = word.removeprefix("llama-")
    if program in PROGRAMS:
        return f"{word} is a program of llama.cpp: {PROGRAMS[program]}"
    close = difflib.get_close_matches(program, names, 1)
    if close:
        return f"{word}: unknown command; did you mean {close[0]}?"
    hint = f"to run a model file, type mpillama -m {word}" if word.endswith(".gguf") else "see mpillama --help"
    return f"{word}: unknown command (there are {', '.join(names)}); {hint}"


def _unknown_flag(
    flag: str, command: Command, options: Mapping[str, Option], known: Mapping[str, Option | ForeignFlag]
) -> str:
    if not flag.startswith("-"):
        return f"unexpected argument {flag!r}: a value follows its flag, and a value with spaces is put in quotes"
    for other in COMMANDS:
        if any(flag in (*option.names, *option.negatives) for option in other.options):
            return f"{flag} is a flag of mpillama {other.name}, not of mpillama {command.name}"
    if owner := accepting_command(flag):
        return f"{flag} is a flag of mpillama {owner}, not of mpillama {command.name}"
    close = difflib.get_close_matches(flag, options, 1) or difflib.get_close_matches(flag, known, 1)
    if not close:
        return f"{flag}: unknown flag; see mpillama {command.name} --help"
    option = options.get(close[0])
    meant = option.long_name if option and close[0] in option.names and flag.startswith("--") else close[0]
    return f"{flag}: unknown flag; did you mean {meant}?"


def overview() -> str:
    """Return the text of ``mpillama --help``: what there is and how to start."""
    width = max(len(command.name) for command in COMMANDS)
    lines = [
        "usage: mpillama [COMMAND] [FLAGS]          on one rank",
        "       mpirun -n N mpillama [COMMAND] [FLAGS]   on N ranks",
        "",
        "Run LLMs from GGUF files as an ordinary MPI program. The flags are llama.cpp's.",
        "",
        "commands:",
        *(f"  {command.name:{width}}  {command.summary}" for command in COMMANDS),
        "",
        "examples:",
        *(f"  {command.examples[0]}" for command in COMMANDS),
        "",
        "mpillama COMMAND --help shows the flags of a command, mpillama --version the version.",
    ]
    return "\n".join(lines)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's formatter with the value named once, after all names of a flag, as Python 3.13 does."""

    def __init__(self, prog: str, **settings: Any) -> None:
        super().__init__(prog, **{**settings, "max_help_position": 36})

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        return names if action.nargs == 0 else f"{names} {action.metavar}"


def command_help(command: Command) -> str:
    """Return the text of ``mpillama COMMAND --help``: flags by group, with defaults and variables, and examples."""
    bare = f" [{command.positional.upper()}]" if command.positional else ""
    parser = argparse.ArgumentParser(
        prog=f"mpillama {command.name}",
        usage=f"mpillama {command.name}{bare} [FLAGS]",
        description=command.summary,
        epilog="examples:\n" + "\n".join(f"  {example}" for example in command.examples),
        formatter_class=_HelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    groups: dict[str, argparse._ArgumentGroup] = {}
    for option in command.options:
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        notes = [f"default: {text}" for text in (option.default_text(),) if text]
        notes += [f"env: {option.env}"] if option.env else []
        text = option.help + (f" ({'; '.join(notes)})" if notes else "")
        names = (*option.names, *option.negatives)
        if option.parse is None:
            groups[option.group].add_argument(*names, action="store_true", help=text.replace("%", "%%"))
        else:
            groups[option.group].add_argument(*names, metavar=option.metavar, help=text.replace("%", "%%"))
    other = parser.add_argument_group("other")
    other.add_argument(*HELP, action="store_true", help="print this help")
    other.add_argument(*VERSION, action="store_true", help="print the version")
    if any(option.dest == "device" for option in command.options):
        other.add_argument(*DEVICES, action="store_true", help="print what ranks of this host can compute on")
    return parser.format_help().rstrip()
