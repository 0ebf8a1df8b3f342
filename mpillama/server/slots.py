"""llama.cpp's slots: a number for each sequence that can run at a time, by which its KV is saved, restored and erased.

The engine has no such places: it keeps KV by what the tokens are. A slot here is a name for a text, the one that runs
under this number or has run last.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpillama.engine.engine import Engine
from mpillama.engine.request import Request
from mpillama.errors import UserError
from mpillama.openai.call import Call
from mpillama.openai.errors import bad
from mpillama.state.sequence import States

# Shorter than the system's limit: while a file is written its name is longer.
_MAX_NAME = 200


@dataclass
class Text:
    """A request's prompt, and what has come after it."""

    tokens: list[int] = field(default_factory=list)
    n_prompt: int = 0
    call: Call | None = None


@dataclass
class Slot:
    """One of the numbers.

    Attributes:
        text: that runs here, or was the last to.
        busy: whether it runs.
        used: orders the slots by when they were used last.
    """

    id: int
    text: Text = field(default_factory=Text)
    busy: bool = False
    used: int = 0

    def as_json(self, n_ctx: int) -> dict[str, Any]:
        """Return what `/slots` says of it."""
        text = self.text
        task = {"id_task": text.call.id} if text.call else {}
        counts = {"n_prompt_tokens": text.n_prompt, "n_decoded": len(text.tokens) - text.n_prompt}
        return {"id": self.id, "n_ctx": n_ctx, "is_processing": self.busy, **task, **counts}


class Slots:
    """Who has which slot; only for the event loop.

    A request gets a free slot as soon as there is one: the one that it asks for; else one whose text it goes on with,
    at least with half of it; else the one that was used the longest time ago.
    """

    def __init__(self, n: int) -> None:
        self._slots = [Slot(i) for i in range(n)]
        self._texts: dict[str, Text] = {}
        self._places: dict[str, Slot] = {}
        self._waiting: deque[str] = deque()
        self._clock = 0

    def __iter__(self) -> Any:
        return iter(self._slots)

    def get(self, name: str) -> Slot:
        """Return a slot by its number in a path; ApiError if there is none."""
        if not name.isdecimal() or len(name) > 9 or int(name) >= len(self._slots):
            raise bad(f"there is no slot {name[:20]!r}; slots are 0 to {len(self._slots) - 1}", "id_slot")
        return self._slots[int(name)]

    def idle(self, name: str) -> Slot:
        """Return a slot in which nothing runs; ApiError if there is none of this number, or it is busy."""
        slot = self.get(name)
        if slot.busy:
            raise bad(f"slot {slot.id} is at work; wait until /slots shows it idle, or name another one", "id_slot")
        return slot

    def check(self, number: int) -> None:
        """Raise ApiError if a request asks for a slot that is not there; -1 is any."""
        if number >= len(self._slots):
            raise bad(f"there is no slot {number}; id_slot must be from -1 to {len(self._slots) - 1}", "id_slot")

    def enter(self, request: Request, call: Call) -> None:
        """Note that a request has come."""
        if request.params.embedding:
            return
        self._texts[request.id] = Text(list(request.prompt), len(request.prompt), call)
        self._waiting.append(request.id)
        self._assign()

    def add(self, request_id: str, tokens: list[int]) -> None:
        """Note what a request's first continuation has written."""
        if request_id in self._texts:
            self._texts[request_id].tokens += tokens

    def leave(self, request_id: str) -> None:
        """Note that a request has ended."""
        if self._texts.pop(request_id, None) is None:
            return
        slot = self._places.pop(request_id, None)
        if slot is None:
            self._waiting.remove(request_id)
        else:
            slot.busy = False
        self._assign()

    def put(self, slot: Slot, tokens: list[int]) -> None:
        """Give a slot another text, of which nothing is known but its tokens."""
        slot.text = Text(tokens, len(tokens))
        self._touch(slot)

    def _assign(self) -> None:
        while self._waiting and (free := [slot for slot in self._slots if not slot.busy]):
            request_id = self._waiting.popleft()
            text = self._texts[request_id]
            assert text.call is not None
            slot = next((slot for slot in free if slot.id == text.call.wanted_slot), None) or _best(free, text.tokens)
            slot.text, slot.busy = text, True
            text.call.slot = slot.id
            self._places[request_id] = slot
            self._touch(slot)

    def _touch(self, slot: Slot) -> None:
        self._clock += 1
        slot.used = self._clock


def _best(free: list[Slot], tokens: list[int]) -> Slot:
    """Return the slot with most of a text that these tokens go on with, else the one not used for longest."""
    alike = []
    for slot in free:
        n = (len(slot.text.tokens) + 1) // 2
        if n and slot.text.tokens[:n] == tokens[:n]:
            alike.append((n, -slot.id, slot))
    return max(alike)[2] if alike else min(free, key=lambda slot: (slot.used, slot.id))


def file_name(value: str) -> str:
    """Return the name of a file within the folder; ApiError if it is none, or leads elsewhere."""
    try:
        data = os.fsencode(value)
    except UnicodeEncodeError:
        data = b""
    if not data or len(data) > _MAX_NAME or value.startswith(".") or set(value) & set("/\\\0"):
        raise bad(
            f"filename must be a plain name of at most {_MAX_NAME} bytes, without / and no dot at its beginning",
            "filename",
        )
    return value


class SlotFiles:
    """Files of texts' KV in one folder; for the main thread, between two steps.

    Args:
        folder: of ``--slot-save-path``, which all ranks see.
        states: of the engine.
        engine: whose prefix cache it is.
    """

    def __init__(self, folder: Path, states: States, engine: Engine) -> None:
        self._folder, self._states, self._engine = folder, states, engine

    def save(self, name: str, tokens: list[int]) -> dict[str, Any]:
        """Save what the KV cache has of a text; ApiError if that is nothing, or it cannot be written."""
        began, path = time.monotonic(), self._folder / name
        try:
            n = self._states.save(path, tokens)
        except UserError as error:
            raise bad(self._without_folder(error), "filename") from None
        if not n:
            raise bad("there is nothing to save: the KV cache has no full block of this slot's text (any more)")
        return {"n_saved": n, "n_written": path.stat().st_size, "timings": {"save_ms": _ms_since(began)}}

    def restore(self, name: str) -> tuple[list[int], dict[str, Any]]:
        """Take a file into the KV cache; returns the tokens that are there now. ApiError if it cannot be used."""
        began, path = time.monotonic(), self._folder / name
        if not path.is_file():
            raise bad(f"there is no file {name!r} of a slot", "filename")
        try:
            tokens = self._states.tokens(path)
            del tokens[self._states.load(path) :]
        except UserError as error:
            raise bad(self._without_folder(error), "filename") from None
        told = {"n_restored": len(tokens), "n_read": path.stat().st_size, "timings": {"restore_ms": _ms_since(began)}}
        return tokens, told

    def erase(self, tokens: list[int]) -> dict[str, Any]:
        """Forget a text's KV, but for what running sequences use."""
        return {"n_erased": self._engine.forget(tokens)}

    def _without_folder(self, error: UserError) -> str:
        """Return the message without what is no business of clients."""
        return error.line.replace(f"{self._folder}/", "")


def _ms_since(began: float) -> float:
    return round(1000 * (time.monotonic() - began), 3)
