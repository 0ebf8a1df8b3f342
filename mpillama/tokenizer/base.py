"""What all tokenizers share: special tokens, BOS and EOS, and turning ids into text."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from mpillama.errors import UserError
from mpillama.tokenizer.vocabulary import TokenType, Vocabulary, is_special, utf8

# What C's isspace takes for white space, which is what llama.cpp strips.
_WHITE_SPACE = " \t\n\v\f\r"


class Tokenizer(ABC):
    """Text to ids and back.

    Attributes: `n_vocab`; `bos_id`, `eos_id`, `eot_id`, `unk_id`, `pad_id` (None where the file has none);
    `special_ids`, every role found (also eom, fim_pre, fim_suf, …); `eog_ids`, the ids that end a generation;
    `add_bos` and `add_eos`, what :meth:`encode` adds; `space_prefix`, whether a space is put before a text and taken
    away again by :meth:`decode`.
    """

    space_prefix = False

    def __init__(self, vocab: Vocabulary) -> None:
        self.vocab = vocab
        self.n_vocab = len(vocab.tokens)
        self.special_ids = vocab.special_ids
        self.bos_id = vocab.special_ids.get("bos")
        self.eos_id = vocab.special_ids.get("eos")
        self.eot_id = vocab.special_ids.get("eot")
        self.unk_id = vocab.special_ids.get("unk")
        self.pad_id = vocab.special_ids.get("pad")
        self.eog_ids = vocab.eog_ids
        self.add_bos = vocab.add_bos
        self.add_eos = vocab.add_eos
        # Longest first (in bytes), so that no special token hides a longer one that contains it.
        special = [i for i, type_ in enumerate(vocab.types) if is_special(type_)]
        self._special = sorted(special, key=lambda i: -len(utf8(vocab.tokens[i])))
        # Some vocabularies have thousands of them, but with few beginnings, which are looked for first.
        self._heads = {vocab.tokens[i][:2] for i in special}

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Ids of a text.

        `add_special` adds BOS and EOS as the file asks for them. With `parse_special` the text of a control token is
        that token; without it is plain text, which is what a text from outside should be. User-defined tokens are
        always tokens. Half a surrogate pair (as in arguments that are not UTF-8) counts as U+FFFD.
        """
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        for fragment in self._fragments(_well_formed(text), parse_special):
            if isinstance(fragment, int):
                ids.append(fragment)
            else:
                ids.extend(self._encode_text(fragment))
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int], special: bool = False) -> str:
        """Text of ids; with `special` control tokens show as their own text, without they are left out.

        Bytes that are no UTF-8 become U+FFFD. The space that :meth:`encode` puts before a text is taken away.
        """
        data = b"".join(self.token_bytes(id_, special) for id_ in ids)
        return (data[1:] if self.space_prefix and data.startswith(b" ") else data).decode(errors="replace")

    def token_bytes(self, id_: int, special: bool = False) -> bytes:
        """Bytes of one token, maybe only a part of a character. Control tokens are empty unless `special`.

        Raises UserError if there is no such id.
        """
        token = self.token_text(id_)
        type_ = self.vocab.types[id_]
        if type_ == TokenType.NORMAL:
            return self._decode_token(token)
        if type_ == TokenType.USER_DEFINED or (special and is_special(type_)):
            return utf8(token)
        if type_ == TokenType.BYTE:
            return bytes((int(token[3:5], 16),))
        return b""

    def token_text(self, id_: int) -> str:
        """The vocabulary's own string for an id (``▁the``, ``Ġthe``, ``<0x0A>``); UserError if there is no such id."""
        if not 0 <= id_ < self.n_vocab:
            raise UserError(f"there is no token {id_}: the vocabulary has ids 0 to {self.n_vocab - 1}")
        return self.vocab.tokens[id_]

    @abstractmethod
    def _encode_text(self, text: str) -> list[int]:
        """Ids of a text without special tokens."""

    @abstractmethod
    def _decode_token(self, token: str) -> bytes:
        """Bytes that a normal token stands for."""

    def _fragments(self, text: str, parse_special: bool) -> list[str | int]:
        """Cut a text at its special tokens; each of them becomes its id."""
        fragments: list[str | int] = [text] if text else []
        heads = {head for head in self._heads if head in text}
        for id_ in self._special if heads else ():
            token = self.vocab.tokens[id_]
            if not parse_special and self.vocab.types[id_] != TokenType.USER_DEFINED:
                continue
            if token[:2] in heads and token in text:
                fragments = [
                    part
                    for fragment in fragments
                    for part in (self._cut(fragment, token, id_) if isinstance(fragment, str) else (fragment,))
                ]
        return fragments

    def _cut(self, text: str, token: str, id_: int) -> list[str | int]:
        """Cut one fragment at every occurrence of one special token."""
        first, *rest = text.split(token)
        parts: list[str | int] = [first] if first else []
        for part in rest:
            parts.append(id_)
            part = part.lstrip(_WHITE_SPACE) if id_ in self.vocab.rstrip else part
            if part:
                parts.append(part)
        return parts


def _well_formed(text: str) -> str:
    """`text` with U+FFFD in place of lone surrogates, which have no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
