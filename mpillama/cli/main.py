"""The entry point: parse, then run a command on this rank."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from mpillama.cli.parser import HelpRequested, find_command, parse
from mpillama.errors import UserError
from mpillama.spmd import launch, let_rank_0_speak, mute, run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; under a launcher every rank calls this."""
    speaks = launch(os.environ).rank == 0
    try:
        name, args = parse(sys.argv[1:] if argv is None else argv, os.environ)
    except (HelpRequested, UserError) as result:
        return _alone(partial(_tell, result), speaks)
    command = find_command(name)
    body = partial(command.load(), args)
    return run(body, args.rank_timeout, command.stranded) if command.parallel else _alone(body, speaks)


def _tell(result: HelpRequested | UserError) -> int:
    if isinstance(result, UserError):
        raise result
    print(result.text)
    return 0


def _alone(body: Callable[[], int], speaks: bool) -> int:
    """Run what needs no other ranks; where a launcher has started several, only rank 0 is heard."""
    if not speaks:
        mute(sys.stdout)
        mute(sys.stderr)
    try:
        code = body()
        sys.stdout.flush()
        return code
    except UserError as error:
        print(f"mpillama: error: {error.line}", file=sys.stderr)
        if not speaks:
            let_rank_0_speak()
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        mute(sys.stdout)
        return 141


if __name__ == "__main__":
    sys.exit(main())
