"""A limit on how long a model thinks before it answers."""

from __future__ import annotations

from collections.abc import Sequence

from mpillama.tokenizer.base import Tokenizer


class ReasoningLimit:
    """Counts the tokens between the tags of a thought, and closes it when there are too many.

    The tags are looked for in the text, so that it does not matter how the model spells them in tokens.

    Args:
        tokenizer: of the model.
        budget: tokens of thinking, the tags not counted; 0 closes a thought as soon as it is opened.
        tags: what opens a thought and what closes it.
        prompt: where a thought may have been opened already.
        lead: what is written behind the tag that closes a thought.
    """

    def __init__(
        self, tokenizer: Tokenizer, budget: int, tags: tuple[str, str], prompt: Sequence[int], lead: str = ""
    ) -> None:
        self._tokenizer, self._budget = tokenizer, budget
        self._open, self._close = (tag.encode() for tag in tags)
        self._closing = tokenizer.encode(tags[1], add_special=False)
        if lead:
            self._closing += tokenizer.encode(lead, add_special=False)
        text = b"".join(tokenizer.token_bytes(token, special=True) for token in prompt)
        self._thinking = text.rfind(self._open) > text.rfind(self._close)
        self._tail, self._n_thought, self._n_closed = b"", 0, 0

    def forced(self) -> int | None:
        """Return the token that must come next, None if the model may choose."""
        if not self._thinking or self._n_thought < self._budget:
            return None
        return self._closing[self._n_closed]

    def accept(self, token: int) -> None:
        """Note the token that has come."""
        if self.forced() is not None:
            self._n_closed += 1
            if self._n_closed == len(self._closing):
                self._thinking, self._tail, self._n_closed = False, b"", 0
            return
        self._n_thought += self._thinking
        tag = self._close if self._thinking else self._open
        self._tail += self._tokenizer.token_bytes(token, special=True)
        if tag in self._tail:
            self._thinking, self._tail = not self._thinking, self._tail.rpartition(tag)[2]
        self._tail = self._tail[-len(tag) :]
