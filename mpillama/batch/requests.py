"""The file of requests, read a line at a time: a million lines take no more memory than one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from mpillama.errors import UsageError

MAX_LINE = 64 << 20
"""Bytes of a line; a longer one is no request."""
URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")


@dataclass(frozen=True)
class Line:
    """A line of the file: a request, or what is wrong with it.

    Attributes:
        number: counted from 1, blank lines too.
        custom_id: None if the line has none.
        url: which kind of request.
        body: of the request.
        error: what is wrong; then ``url`` and ``body`` say nothing.
    """

    number: int
    custom_id: str | None
    url: str = ""
    body: dict[str, Any] | None = None
    error: str = ""

    @property
    def result_id(self) -> str:
        """The id of its result."""
        return f"batch_req_{self.number}"


class Requests:
    """Reads requests from a file, or from stdin if the path is ``-``.

    Raises:
        UsageError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: BinaryIO = sys.stdin.buffer if str(path) == "-" else path.open("rb", buffering=1 << 20)
            self.n_bytes = os.fstat(self._file.fileno()).st_size
            if path.is_dir():
                raise UsageError(f"-i {path}: is a directory; name a file of JSON lines")
        except OSError as error:
            raise UsageError(f"-i {path}: {error.strerror}") from None
        self.bytes_read = 0

    def __iter__(self) -> Iterator[Line]:
        number = 0
        while True:
            try:
                raw = self._file.readline(MAX_LINE)
                number += 1
                self.bytes_read += len(raw)
                too_long = len(raw) == MAX_LINE and not raw.endswith(b"\n")
                while too_long and (more := self._file.readline(MAX_LINE)):
                    self.bytes_read += len(more)
                    if more.endswith(b"\n"):
                        break
            except OSError as error:
                raise UsageError(f"-i {self._path}: {error.strerror}") from None
            if not raw:
                return
            if too_long:
                yield Line(number, None, error=f"longer than {MAX_LINE >> 20} MiB")
            elif raw.strip():
                yield parse_line(raw, number)


def parse_line(raw: bytes, number: int) -> Line:
    """Check what can be checked without a model: a line of JSON with custom_id, method, url and body."""
    custom_id: str | None = None
    try:
        line = json.loads(raw)
        if not isinstance(line, dict):
            raise ValueError("expected an object with custom_id, method, url and body")
        if not isinstance(line.get("custom_id"), str) or not line["custom_id"]:
            raise ValueError("custom_id is missing, or no text")
        custom_id = line["custom_id"]
        if line.get("method", "POST") != "POST":
            raise ValueError("method must be POST")
        if line.get("url") not in URLS:
            raise ValueError(f"url must be one of {', '.join(URLS)}")
        if not isinstance(line.get("body"), dict):
            raise ValueError("body is missing, or no object")
    except UnicodeDecodeError:
        return Line(number, custom_id, error="not UTF-8 text")
    except json.JSONDecodeError as error:
        return Line(number, custom_id, error=f"not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return Line(number, custom_id, error="not JSON that can be read: nested too deeply")
    except ValueError as error:
        return Line(number, custom_id, error=str(error))
    return Line(number, custom_id, line["url"], line["body"])
