"""Long texts are tokenized by a process of their own.

One thread at a time can run Python, and a step of the engine calls native code some hundred times, each time giving up
its turn: next to a thread that tokenizes, it would be slower by a factor of ten for as long as that takes.
"""

from __future__ import annotations

import copy
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Mapping
from threading import Lock
from typing import IO, Any

from mpillama.tokenizer import Tokenizer, load_tokenizer

_SHORT = 4096
"""Characters that are tokenized in less time than it takes to ask."""

_SIZE = struct.Struct("<Q")


class Encoder:
    """A process that tokenizes. It ends when this program does, however that ends, as nothing more can be read then.

    Args:
        tokenizer: for short texts.
        metadata: of its file, from which the process makes its own.
    """

    def __init__(self, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
        self._tokenizer, self._metadata, self._lock = tokenizer, dict(metadata), Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def proxy(self) -> Tokenizer:
        """Return a tokenizer like the given one, but that its `encode` lets the process do the long texts."""
        other = copy.copy(self._tokenizer)
        other.encode = self._encode  # type: ignore[method-assign]
        return other

    def _encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        if len(text) <= _SHORT:
            return self._tokenizer.encode(text, add_special, parse_special)
        with self._lock:
            try:
                return self._ask(text, add_special, parse_special)
            except (OSError, EOFError):
                # Killed, perhaps for its memory; the next text gets a new one.
                self.close()
        return self._tokenizer.encode(text, add_special, parse_special)

    def _ask(self, *question: object) -> list[int]:
        if self._process is None:
            # No launcher's variables: this is no rank.
            env = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI", "SLURM"))}
            command = [sys.executable, "-c", "from mpillama.server.encoder import main; main()"]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
            _write(self._process.stdin, self._metadata)
        _write(self._process.stdin, question)
        answer = _read(self._process.stdout)
        assert isinstance(answer, list)
        return answer

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _write(stream: IO[bytes] | None, value: object) -> None:
    assert stream is not None
    data = pickle.dumps(value)
    stream.write(_SIZE.pack(len(data)) + data)
    stream.flush()


def _read(stream: IO[bytes] | None) -> object:
    assert stream is not None
    head = stream.read(_SIZE.size)
    if len(head) < _SIZE.size:
        raise EOFError
    return pickle.loads(stream.read(_SIZE.unpack(head)[0]))


def main() -> None:
    """Be the process: read the metadata of a file, then answer questions until there are no more."""
    import signal

    # A terminal's Ctrl-C and a launcher's signals are for the ranks; the end of the questions is the end of this.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    try:
        metadata = _read(questions)
        assert isinstance(metadata, dict)
        tokenizer = load_tokenizer(metadata)
        while True:
            question = _read(questions)
            assert isinstance(question, tuple)
            _write(answers, tokenizer.encode(*question))
    except (EOFError, BrokenPipeError):
        return
