"""Chats whose answers are told in the words of another API."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from mpillama.engine.request import Output
from mpillama.openai.call import Call, Chunk, to_json
from mpillama.openai.chat import ChatCall
from mpillama.openai.context import Context
from mpillama.openai.fields import Fields


class RetoldChat(Call):
    """A chat that is served as one, and streamed as events with names.

    Attributes:
        chat: what is retold.
    """

    tail = b""

    def __init__(self, context: Context, fields: Fields, id: str = "") -> None:
        super().__init__(context, fields, id)
        self.chat = ChatCall(context, Fields(self.chat_body()), self.id)
        self.requests, self.usages = self.chat.requests, self.chat.usages
        self._begun = False

    @abstractmethod
    def chat_body(self) -> Chunk:
        """Return the body of a chat completion that asks for the same."""

    @abstractmethod
    def begin(self) -> list[Chunk]:
        """Return the events before all others."""

    @abstractmethod
    def on_delta(self, delta: Chunk) -> list[Chunk]:
        """Return the events that a piece of the chat's message is worth."""

    @abstractmethod
    def end(self) -> list[Chunk]:
        """Return the events after all others."""

    def push(self, output: Output) -> list[Chunk]:
        """Take an output of the engine; returns the events that it is worth."""
        chunks = self.chat.push(output)
        self.error = self.chat.error
        if not self.stream or self.error is not None:
            return []
        events = [] if self._begun else self.begin()
        self._begun = True
        for chunk in chunks:
            for choice in chunk["choices"]:
                events += self.on_delta(choice["delta"])
        return events + self.end() if self.done else events

    @property
    def done(self) -> bool:
        """Whether all outputs have come."""
        return self.chat.done

    def take(self, choice: int, output: Output) -> list[Chunk]:
        """Do nothing: the chat takes outputs."""
        return []

    def frame(self, chunk: Chunk) -> bytes:
        """Return an event with its name."""
        name: Any = chunk.get("type", "error")
        return b"event: " + str(name).encode() + b"\ndata: " + to_json(chunk) + b"\n\n"
