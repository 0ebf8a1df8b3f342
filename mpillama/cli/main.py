"""The entry point: parse, then run a command on this rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import partial

from mpillama.cli.parser import HelpRequested, find_command, parse
from mpillama.errors import UserError
from mpillama.spmd import launch, mute, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; under a launcher every rank calls this."""
    speaks = launch(os.environ).rank == 0
    try:
        name, args = parse(sys.argv[1:] if argv is None else argv, os.environ)
    except HelpRequested as help:
        if speaks:
            print(help.text)
        return 0
    except UserError as error:
        if speaks:
            print(f"mpillama: error: {error}", file=sys.stderr)
        return error.exit_code
    command = find_command(name)
    if command.parallel:
        return run(partial(command.load(), args))
    return _run_alone(partial(command.load(), args), speaks)


def _run_alone(body: partial[int], speaks: bool) -> int:
    """Run a command that needs no other ranks; where a launcher has started several, only rank 0 is heard."""
    if not speaks:
        mute(sys.stdout)
        mute(sys.stderr)
    try:
        return body()
    except UserError as error:
        print(f"mpillama: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute(sys.stdout)
        return 141


if __name__ == "__main__":
    sys.exit(main())
