"""What a client is told when its request cannot be served."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mpillama.errors import UserError

# Where the name in JSON is not the flag's own with underscores.
_JSON_NAMES = {
    "temp": "temperature",
    "typical": "typical_p",
    "top-nsigma": "top_n_sigma",
    "dynatemp-exp": "dynatemp_exponent",
    "mirostat-lr": "mirostat_eta",
    "mirostat-ent": "mirostat_tau",
    "dry-sequence-breaker": "dry_sequence_breakers",
}
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error", 503: "unavailable_error"}


class ApiError(UserError):
    """An answer other than 200.

    Args:
        status: of HTTP.
        message: one line that says what is wrong and what to do.
        type: OpenAI's class of errors; by default the one that goes with the status.
        param: the field that is wrong.
        code: a word for programs.
    """

    def __init__(
        self, status: int, message: str, type: str | None = None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code
        default = "invalid_request_error" if status < 500 else "server_error"
        self.type = type or _TYPES.get(status, default)

    def body(self) -> dict[str, Any]:
        """Return the answer's JSON."""
        return {"error": {"message": self.line, "type": self.type, "param": self.param, "code": self.code}}


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that is wrong in itself."""
    return ApiError(400, message, param=param, code=code)


@contextmanager
def as_bad_request(param: str | None = None) -> Iterator[None]:
    """Turn a UserError of the program into a 400 of the request; a flag in its message becomes the field's name."""
    try:
        yield
    except ApiError:
        raise
    except UserError as error:
        message, found = error.line, re.match(r"--([a-z-]+)", error.line)
        if found:
            name = _JSON_NAMES.get(found[1], found[1].replace("-", "_"))
            message, param = name + message[found.end() :], param or name
        raise bad(message, param) from error
