"""Text files that flags name."""

from __future__ import annotations

from pathlib import Path

from mpillama.errors import UsageError


def read_text(path: str | Path, flag: str) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        UsageError: naming ``flag`` and ``path``: it cannot be read, or is not UTF-8.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{flag} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{flag} {path}: the file is not UTF-8 text") from None
