"""Text of a generation, piece by piece."""

from __future__ import annotations

import codecs

from mpillama.tokenizer.base import Tokenizer


class StreamDecoder:
    """Turns ids into text one at a time; a character is given out when its last byte is there.

    All pieces together are what :meth:`Tokenizer.decode` gives for all ids. With `continues` the ids go on after a text
    (an answer after its prompt), so that a space at their beginning is theirs and is kept.
    """

    def __init__(self, tokenizer: Tokenizer, special: bool = False, continues: bool = False) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._strip = tokenizer.space_prefix and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id_: int) -> str:
        """Whole characters that `id_` completes, maybe none. UserError if there is no such id."""
        data = self._tokenizer.token_bytes(id_, self._special)
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """What is left at the end: U+FFFD if the ids ended inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)
