"""Rank 0's end of a conversation with a person: lines in, text out, Ctrl-C."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PROMPT, CONTINUED = "> ", "| "
_DIM, _PLAIN = "\x1b[2m", "\x1b[22m"
_HISTORY_LINES = 1000
# A launcher passes on a Ctrl-C that the terminal has delivered already.
_SAME_CTRL_C = 0.3
# How long a signal may go unnoticed that came just before the terminal was read.
_UNNOTICED = 0.2


def history_path(environ: Mapping[str, str]) -> Path:
    """Return the file of lines typed earlier, below XDG's folder for state."""
    state = environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "mpillama" / "chat_history"


class Console:
    """Reads lines and writes answers.

    Args:
        asks: whether to show that input is awaited; without, only answers reach stdout and remarks go to stderr.
        history: file of lines typed earlier; used on a terminal only.
    """

    def __init__(self, asks: bool, history: Path) -> None:
        self._asks, self._history = asks, history
        self._terminal = sys.stdin.isatty() and sys.stdout.isatty()
        self._dims = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._reading = self._thinking = False
        self._last_ctrl_c = -1.0
        self.stopped = False
        self._readline = self._open_readline() if self._terminal else None
        reconfigure = getattr(sys.stdin, "reconfigure", None)
        if reconfigure is not None:
            # A byte that is no UTF-8 is no reason to leave.
            reconfigure(errors="replace")

    def _open_readline(self) -> Any:
        try:
            readline = importlib.import_module("readline")
        except ImportError:
            return None
        readline.set_history_length(_HISTORY_LINES)
        try:
            readline.read_history_file(self._history)
        except OSError:
            # The first conversation, or a home that cannot be read: then there is no history.
            return readline
        return readline

    def close(self) -> None:
        """Keep the history."""
        if self._readline is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            self._readline.write_history_file(self._history)
            self._history.chmod(0o600)
        except OSError as error:
            self.say(f"the history is not kept: {self._history}: {error.strerror}")

    # -- in --------------------------------------------------------------------------------------------------------

    def ctrl_c(self) -> None:
        """Handle Ctrl-C: it ends what is typed, or sets ``stopped``."""
        now = time.monotonic()
        if now - self._last_ctrl_c < _SAME_CTRL_C:
            return
        self._last_ctrl_c = now
        if self._reading:
            raise KeyboardInterrupt
        self.stopped = True

    def read(self) -> str | None:
        """Return the next message; None at the end of input, or after a second Ctrl-C."""
        lines: list[str] = []
        warned = False
        while True:
            try:
                self._reading = True
                line = self._line(CONTINUED if lines else PROMPT)
                self._reading = False
            except KeyboardInterrupt:
                self._reading = False
                self.write("\n")
                if warned:
                    return None
                self.say("Ctrl-C again, or Ctrl-D, leaves")
                lines, warned = [], True
                continue
            finally:
                self._reading = False
            if line is None:
                if self._asks:
                    self.write("\n")
                return "\n".join(lines) if lines else None
            if line.endswith("\\"):
                lines.append(line[:-1])
                continue
            return "\n".join([*lines, line])

    def _line(self, prompt: str) -> str | None:
        with _noticing_signals():
            if self._terminal:
                try:
                    return input(prompt)
                except EOFError:
                    return None
            if self._asks:
                self.write(prompt)
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None

    # -- out -------------------------------------------------------------------------------------------------------

    def write(self, text: str) -> None:
        """Write a part of an answer."""
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()

    def think(self, text: str) -> None:
        """Write a part of a thought: dimmed on a terminal, between tags elsewhere."""
        if text and not self._thinking:
            self._thinking = True
            self.write(_DIM if self._dims else "<think>\n")
        self.write(text)

    def end_thought(self) -> None:
        """Go back to the answer."""
        if self._thinking:
            self._thinking = False
            self.write(f"{_PLAIN}\n\n" if self._dims else "\n</think>\n\n")

    def say(self, text: str) -> None:
        """Write a remark that is no part of an answer."""
        stream: TextIO = sys.stdout if self._asks else sys.stderr
        print(f"{_DIM}{text}{_PLAIN}" if self._dims and self._asks else text, file=stream, flush=True)


@contextmanager
def _noticing_signals() -> Iterator[None]:
    """Let what waits for input be interrupted now and then.

    Python handles a signal between two of its own instructions, or when it interrupts a system call: one that comes
    after the last instruction before such a call would have to wait until somebody types.
    """
    # Never taken back: an alarm that is still on its way would end the process.
    signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, _UNNOTICED, _UNNOTICED)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
