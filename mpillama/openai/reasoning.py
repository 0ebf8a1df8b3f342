"""What a model thinks and what it says, told apart while the text comes."""

from __future__ import annotations

HARMONY_TAGS = ("<|channel|>analysis<|message|>", "<|end|>")
"""What a thought is between in OpenAI's harmony format."""


def opens_thought(prompt: str, tags: tuple[str, str]) -> bool:
    """Whether a prompt ends within a thought that its template has opened."""
    return prompt.rfind(tags[0]) > prompt.rfind(tags[1])


def held_back(text: str, tag: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a tag."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


class ReasoningSplitter:
    """Splits a text into thought and answer.

    A thought is at the beginning, between the tags. White space around it belongs to neither.

    Args:
        tags: what opens a thought and what closes it.
        thinking: whether the prompt has opened it already.
    """

    def __init__(self, tags: tuple[str, str], thinking: bool) -> None:
        self._open, self._close = tags
        self._state = "thinking" if thinking else "start"
        self._held = ""
        self._thought = False

    def push(self, text: str) -> tuple[str, str]:
        """Return what is certain of the thought and of the answer."""
        self._held += text
        thought = ""
        if self._state == "start":
            beginning = self._held.lstrip()
            if not beginning or (self._open.startswith(beginning) and beginning != self._open):
                return "", ""
            if not beginning.startswith(self._open):
                self._state = "answer"
            else:
                self._state, self._held = "thinking", beginning[len(self._open) :]
        if self._state == "thinking":
            thought = self._think()
        if self._state == "after":
            self._held = self._held.lstrip()
            self._state = "answer" if self._held else "after"
        answer = ""
        if self._state == "answer":
            answer, self._held = self._held, ""
        return thought, answer

    def _think(self) -> str:
        if not self._thought:
            self._held = self._held.lstrip()
        at = self._held.find(self._close)
        if at >= 0:
            thought, self._held = self._held[:at].rstrip(), self._held[at + len(self._close) :]
            self._state = "after"
        else:
            n = len(self._held) - held_back(self._held, self._close)
            n = len(self._held[:n].rstrip())
            thought, self._held = self._held[:n], self._held[n:]
        self._thought = self._thought or bool(thought)
        return thought

    def flush(self) -> tuple[str, str]:
        """Return what is still held back, at the end of the text."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state == "thinking" else ("", held if self._state == "start" else "")
