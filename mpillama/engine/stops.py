"""Strings that end a text."""

from __future__ import annotations


class StopStrings:
    """Holds text back that may turn out to be the beginning of a stop string.

    Attributes:
        found: the stop string that has ended the text, "" before that.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.found = ""

    def push(self, text: str) -> str:
        """Return what can be shown for sure; after a stop string, what came before it."""
        if not self._stops:
            return text
        self._held += text
        where = [(self._held.find(stop), stop) for stop in self._stops if stop in self._held]
        if where:
            at, self.found = min(where)
            return self._take(at)
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        return self._take(len(self._held) - keep)

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text

    def flush(self) -> str:
        """Return what is still held back."""
        return self._take(len(self._held))
