"""The one exception that a user may cause.

Everything a user can get wrong (a flag, a file, a size) is raised as :class:`UserError` or a subclass. The program
prints its message as a single line and exits with :attr:`UserError.exit_code` on every rank; it never prints a
traceback for it. Anything else that escapes is a bug and is printed with its traceback.
"""

from __future__ import annotations


class UserError(Exception):
    """A mistake outside the program; the message is one line and says what to do about it."""

    exit_code = 1

    @property
    def line(self) -> str:
        """The message on one line, whatever a file name or a library has put into it."""
        return " ".join(str(self).split())

    told = False
    """Whether the other ranks have learned of it already, and are on their way out."""


class UsageError(UserError):
    """A wrong command line: unknown flag, bad value, impossible combination."""

    exit_code = 2


class GGUFError(UserError):
    """A model file that is broken, truncated or not GGUF."""


class ModelError(UserError):
    """A sound GGUF file that cannot be run: unknown architecture, missing tensor, wrong shape, unsupported type."""


class PeerFailure(UserError):
    """Another rank failed and has already told the user; this rank leaves with the same exit code, in silence."""

    told = True

    def __init__(self, exit_code: int = 1, message: str = "another rank failed") -> None:
        super().__init__(exit_code, message)
        self.exit_code, self.message = exit_code, message

    def __str__(self) -> str:
        return self.message


class JobError(Exception):
    """The ranks of a job no longer work together: one of them is stuck, has died, or computes something else.

    Not a `UserError`: whoever handles one of those goes on to tell the other ranks, and would wait for them for ever.
    """

    told = False
    """Whether all ranks have raised it, and can leave in peace."""

    own = False
    """Whether it is about the rank that raises it, whose name then stands before the message."""
