"""Grammars that an answer must follow, by llguidance: JSON schemas, GBNF, Lark and regular expressions."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from copy import copy
from threading import Lock
from types import MappingProxyType
from typing import Any, NamedTuple

import llguidance
import numpy as np
from llguidance.gbnf_to_lark import any_to_lark

from mpillama.errors import UserError
from mpillama.tokenizer.base import Tokenizer

_MAX_SIZE = 200_000
# JSON may have any amount of white space, and a small model that may write it writes nothing else.
WHITE_SPACE = r" |\n[ \t]{0,20}"


class Source(NamedTuple):
    """What a constraint in its first state is made of, for another process to make the same one.

    Attributes:
        kind: of grammar, one of those that `Grammars` compiles.
        text: of the grammar.
        after: what closes the thought after which it begins to hold; "": it holds from the beginning.
        lead: what comes between that and the text that it is for.
    """

    kind: str
    text: str
    after: str = ""
    lead: str = ""


class GrammarConstraint:
    """A text that follows a compiled grammar; the engine's `Constraint`.

    Args:
        matcher: the grammar, in some state.
        source: of the grammar.
    """

    def __init__(self, matcher: llguidance.LLMatcher, source: Source) -> None:
        self._matcher, self.source = matcher, source

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing may follow it."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def mask(self) -> np.ndarray:
        """Return the allowed tokens as bits in uint32.

        Raises:
            UserError: following the grammar has become too expensive.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
        self._check()
        return bits

    def accept(self, token: int) -> None:
        """Advance by a token; one that the mask does not allow makes the next `mask` fail."""
        self._matcher.consume_token(token)

    def fork(self) -> GrammarConstraint:
        """Return another object in the same state."""
        return GrammarConstraint(self._matcher.deep_copy(), self.source)

    def _check(self) -> None:
        if self._matcher.is_error():
            raise UserError(f"the text cannot go on along the grammar: {_first_line(self._matcher.get_error())}")


class AfterThought:
    """A constraint that begins to hold when the model has closed its thought; the text cannot end before.

    Args:
        inner: what holds then.
        tokenizer: of the model.
        tag: what closes the thought.
        lead: what must come between that and the text that ``inner`` is for.
    """

    def __init__(self, inner: GrammarConstraint, tokenizer: Tokenizer, tag: str, lead: str = "") -> None:
        self.source = inner.source._replace(after=tag, lead=lead)
        self._inner, self._tokenizer, self._tag = inner, tokenizer, tag.encode()
        self._lead = tuple(tokenizer.encode(lead, add_special=False)) if lead else ()
        self._tail, self._thinking = b"", True
        self._open = np.full_like(inner.mask(), 0xFFFFFFFF)
        for token in tokenizer.eog_ids:
            self._open[token // 32] &= np.uint32(0xFFFFFFFF ^ 1 << token % 32)

    @property
    def finished(self) -> bool:
        """Whether the text is complete."""
        return not self._thinking and not self._lead and self._inner.finished

    def mask(self) -> np.ndarray:
        """Return the allowed tokens: all that do not end the text, while the model thinks."""
        if not self._thinking and self._lead:
            mask = np.zeros_like(self._open)
            mask[self._lead[0] // 32] = np.uint32(1 << self._lead[0] % 32)
            return mask
        return self._open if self._thinking else self._inner.mask()

    def accept(self, token: int) -> None:
        """Advance by a token."""
        if not self._thinking:
            if self._lead:
                self._lead = self._lead[1:]
            else:
                self._inner.accept(token)
            return
        self._tail += self._tokenizer.token_bytes(token, special=True)
        self._thinking = self._tag not in self._tail
        self._tail = self._tail[-len(self._tag) :]

    def fork(self) -> AfterThought:
        """Return another object in the same state."""
        other = copy(self)
        other._inner = self._inner.fork()
        return other


class Grammars:
    """Compiles grammars for one vocabulary, and keeps the last ones; may be used by several threads.

    Every method returns a constraint in its first state and raises UserError if the grammar is broken or too complex.

    Args:
        tokenizer: of the model.
        n_vocab: of the logits.
        n_kept: compiled grammars.
    """

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, n_kept: int = 64) -> None:
        self._tokenizer, self._n_vocab, self._n_kept = tokenizer, n_vocab, n_kept
        self._lock = Lock()
        self._vocabulary: llguidance.LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], llguidance.LLMatcher] = OrderedDict()

    def json_schema(self, schema: Any) -> GrammarConstraint:
        """Texts that are JSON and fit a schema; an empty one means any object, as in llama.cpp."""
        if schema is True or schema == {}:
            schema = {"type": "object"}
        if not isinstance(schema, dict):
            raise UserError("a JSON schema must be an object")
        return self._constraint("JSON schema", json.dumps(schema))

    def gbnf(self, text: str) -> GrammarConstraint:
        """Texts of a grammar in GBNF, llama.cpp's notation, whose first rule is ``root``; or in Lark's."""
        return self._constraint("grammar", text)

    def lark(self, text: str) -> GrammarConstraint:
        """Texts of a grammar in Lark's notation as llguidance understands it, whose first rule is ``start``."""
        return self._constraint("Lark grammar", text)

    def regex(self, text: str) -> GrammarConstraint:
        """Texts that match a regular expression as a whole."""
        return self._constraint("regular expression", text)

    def again(self, source: Source) -> GrammarConstraint | AfterThought:
        """Make the constraint that another process has made of its source."""
        constraint = self._constraint(source.kind, source.text)
        if not source.after:
            return constraint
        return AfterThought(constraint, self._tokenizer, source.after, source.lead)

    def _constraint(self, kind: str, text: str) -> GrammarConstraint:
        if len(text) > _MAX_SIZE:
            raise UserError(f"the {kind} has {len(text)} characters; at most {_MAX_SIZE} are accepted")
        with self._lock:
            matcher = self._kept.get((kind, text))
            if matcher is not None:
                self._kept.move_to_end((kind, text))
        if matcher is None:
            matcher = self._compile(kind, text)
            with self._lock:
                self._kept[kind, text] = matcher
                while len(self._kept) > self._n_kept:
                    self._kept.popitem(last=False)
        return GrammarConstraint(matcher, Source(kind, text))

    def _compile(self, kind: str, text: str) -> llguidance.LLMatcher:
        try:
            grammar = _CONVERTERS[kind](text)
        except RecursionError:
            raise UserError(f"the {kind} is nested too deeply") from None
        except Exception as error:  # the converter of GBNF raises plain Exception
            raise UserError(f"the {kind} is not valid: {_first_line(str(error))}") from error
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._open_vocabulary(), grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise UserError(f"the {kind} cannot be used: {_first_line(matcher.get_error())}")
        return matcher

    def _open_vocabulary(self) -> llguidance.LLTokenizer:
        """Build llguidance's view of the vocabulary, when it is needed first."""
        with self._lock:
            if self._vocabulary is None:
                source: Any = llguidance.TokenizerWrapper(_Vocabulary(self._tokenizer, self._n_vocab))
                eog = sorted(self._tokenizer.eog_ids) or None
                self._vocabulary = llguidance.LLTokenizer(source, self._n_vocab, eog)
            return self._vocabulary


class _Vocabulary:
    """What llguidance wants to know of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.eog_ids, default=0)
        self.bos_token_id = tokenizer.bos_id
        self.special_token_ids: list[int] = []
        self.tokens: list[bytes] = []
        for id_ in range(min(tokenizer.n_vocab, n_vocab)):
            data = tokenizer.token_bytes(id_)
            # 0xFF is in no UTF-8; at the beginning it marks a token that no text of a grammar can be spelled with.
            if not data or data[0] == 0xFF:
                name = b"" if data else tokenizer.token_bytes(id_, special=True)
                data = b"\xff" + (name or b"<unused>")
                self.special_token_ids.append(id_)
            self.tokens.append(data)
        self.tokens += [b"\xff<unused>"] * (n_vocab - len(self.tokens))

        self._of_byte = {data[0]: id_ for id_, data in reversed(list(enumerate(self.tokens))) if len(data) == 1}

    def __call__(self, text: bytes | str) -> list[int]:
        """Return ids whose bytes are exactly these."""
        data = text.encode() if isinstance(text, str) else text
        # Some tokenizers put a space before a text; after a newline it is known what to take away again.
        begin = self._tokenizer.encode("\n", add_special=False)
        ids = self._tokenizer.encode("\n" + data.decode(errors="replace"), False, parse_special=False)
        if ids[: len(begin)] == begin and b"".join(map(self.tokens.__getitem__, ids[len(begin) :])) == data:
            return ids[len(begin) :]
        ids = self._tokenizer.encode(data.decode(errors="replace"), False, parse_special=False)
        if b"".join(map(self.tokens.__getitem__, ids)) == data:
            return ids
        return [self._of_byte[byte] for byte in data if byte in self._of_byte]


def _json_grammar(schema: str) -> str:
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": WHITE_SPACE})


_CONVERTERS: Mapping[str, Callable[[str], str]] = MappingProxyType(
    {
        "JSON schema": _json_grammar,
        "grammar": lambda text: llguidance.LLMatcher.grammar_from_lark(any_to_lark(text)),
        "Lark grammar": llguidance.LLMatcher.grammar_from_lark,
        "regular expression": llguidance.LLMatcher.grammar_from_regex,
    }
)


def _first_line(text: str) -> str:
    """Return the sentence that matters of a library's message."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return re.sub(r"\s+", " ", lines[0])[:300] if lines else "unknown error"
