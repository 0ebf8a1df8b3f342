"""Flags that constrain what is generated, and the constraint that they ask for."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace

from mpillama.cli import values
from mpillama.cli.files import read_text
from mpillama.cli.options import Option
from mpillama.engine.request import Constraint
from mpillama.errors import UsageError, UserError
from mpillama.tokenizer import Tokenizer

_DESTS = ("grammar", "grammar_file", "json_schema", "json_schema_file")


def _only(dest: str) -> tuple[str, ...]:
    return tuple(other for other in _DESTS if other != dest)


_OPTIONS = (
    Option(("--grammar",), "GBNF grammar that the text must follow", str, None, "GRAMMAR"),
    Option(("--grammar-file",), "file with a GBNF grammar", values.path, None, "FNAME"),
    Option(("-j", "--json-schema"), "JSON schema that the text must fit; {} = any object", str, None, "SCHEMA"),
    Option(("-jf", "--json-schema-file"), "file with a JSON schema", values.path, None, "FILE"),
)
GRAMMAR = tuple(replace(option, group="sampling", excludes=_only(option.dest)) for option in _OPTIONS)


def constraint_from(args: Namespace, tokenizer: Tokenizer, n_vocab: int) -> Constraint | None:
    """Return the constraint that the flags ask for, None without any.

    Raises:
        UsageError: it is no grammar or schema, or the file cannot be read.
    """
    dest = next((dest for dest in _DESTS if getattr(args, dest) is not None), None)
    if dest is None:
        return None
    from mpillama.openai.constraints import Grammars

    flag = "--" + dest.replace("_", "-")
    text = str(getattr(args, dest))
    if dest.endswith("_file"):
        flag, text = f"{flag} {text}", read_text(text, flag)
    grammars = Grammars(tokenizer, n_vocab)
    try:
        return grammars.gbnf(text) if dest.startswith("grammar") else grammars.json_schema(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{flag}: not JSON: {error}") from None
    except UserError as error:
        raise UsageError(f"{flag}: {error.line}") from None
