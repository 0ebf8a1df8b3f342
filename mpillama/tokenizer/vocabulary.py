"""The vocabulary of a GGUF file: tokens, their types, and which ids are special.

The rules are those of llama.cpp (``llama_vocab::impl::load``), because files rely on them: many name their
end-of-generation tokens by text only, and many give control tokens the wrong type.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType
from typing import Any

from mpillama.errors import ModelError


class TokenType(IntEnum):
    """Values of ``tokenizer.ggml.token_type``."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# Plain numbers, since half a million types are compared with them.
_SPECIAL = frozenset(map(int, (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)))
_BYTE = int(TokenType.BYTE)

# The metadata keys of special ids, "tokenizer.ggml." left off; a later key wins over an earlier one.
_ID_KEYS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "bos": ("bos_token_id",),
        "eos": ("eos_token_id",),
        "eot": ("eot_token_id",),
        "eom": ("eom_token_id",),
        "unk": ("unknown_token_id",),
        "pad": ("padding_token_id",),
        "fim_pre": ("fim_pre_token_id", "prefix_token_id"),
        "fim_suf": ("fim_suf_token_id", "suffix_token_id"),
        "fim_mid": ("fim_mid_token_id", "middle_token_id"),
        "fim_pad": ("fim_pad_token_id",),
        "fim_rep": ("fim_rep_token_id",),
        "fim_sep": ("fim_sep_token_id",),
    }
)

# Texts by which a special id is found where its key is missing.
_ID_TEXTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "eot": (
            "<|eot_id|>",
            "<|im_end|>",
            "<|end|>",
            "<end_of_turn>",
            "<|endoftext|>",
            "<|end_of_text|>",
            "<EOT>",
            "_<EOT>",
            "[EOT]",
            "<｜end▁of▁sentence｜>",
            "<end_of_utterance>",
        ),
        "eom": ("<|eom_id|>",),
        "fim_pre": (
            "<|fim_prefix|>",
            "<fim-prefix>",
            "<fim_prefix>",
            "<｜fim▁begin｜>",
            "<PRE>",
            "▁<PRE>",
            "<|code_prefix|>",
            "<|prefix|>",
        ),
        "fim_suf": (
            "<|fim_suffix|>",
            "<fim-suffix>",
            "<fim_suffix>",
            "<｜fim▁hole｜>",
            "<SUF>",
            "▁<SUF>",
            "<|code_suffix|>",
            "<|suffix|>",
        ),
        "fim_mid": (
            "<|fim_middle|>",
            "<fim-middle>",
            "<fim_middle>",
            "<｜fim▁end｜>",
            "<MID>",
            "▁<MID>",
            "<|code_middle|>",
            "<|middle|>",
        ),
        "fim_pad": ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"),
        "fim_rep": ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"),
        "fim_sep": ("<|file_sep|>",),
    }
)

# Tokens that end a generation wherever a vocabulary has them.
_EOG_TEXTS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|flush|>",
    "<|calls|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "</s>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|end_of_text|>",
    "<end_of_utterance>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<｜end▁of▁sentence｜>",
    "[e~[",
)

# The frame of the harmony format is part of what a model says there, so it is shown.
_SHOWN_TEXTS = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """Tokens and their roles.

    `ids` maps a token's text to its id, `special_ids` a role (bos, eos, eot, …) to an id; `rstrip` holds the ids of
    special tokens that swallow the white space behind them.
    """

    tokens: Sequence[str]
    types: Sequence[int]
    ids: Mapping[str, int]
    special_ids: Mapping[str, int]
    eog_ids: frozenset[int]
    rstrip: frozenset[int]
    add_bos: bool
    add_eos: bool


def utf8(token: str) -> bytes:
    """Bytes of a token's text; surrogate escapes, for what was not UTF-8 in the file, become the same bytes again."""
    return token.encode("utf-8", "surrogateescape")


def required(metadata: Mapping[str, Any], key: str) -> Any:
    """The value of ``tokenizer.ggml.KEY``; ModelError if the file does not have it."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is None:
        raise ModelError(f"the file has no tokenizer.ggml.{key}, which its tokenizer needs; convert the model again")
    return value


def per_token(metadata: Mapping[str, Any], key: str, n_vocab: int) -> list[Any]:
    """The array ``tokenizer.ggml.KEY`` as a list with one entry per token; ModelError if it is missing or too short."""
    values = required(metadata, key)
    if len(values) < n_vocab:
        raise ModelError(f"tokenizer.ggml.{key} has {len(values)} entries for {n_vocab} tokens: the file is broken")
    return (values.tolist() if hasattr(values, "tolist") else list(values))[:n_vocab]


def special_ids_by_key(metadata: Mapping[str, Any], n_vocab: int) -> dict[str, int]:
    """Special ids that the keys name. Ids outside the vocabulary are passed over: converters write -1 for "none"."""
    found: dict[str, int] = {}
    if metadata.get("tokenizer.ggml.model") == "llama":
        # SentencePiece's own ids, which old files leave unsaid. (For gpt2 llama.cpp falls back to Falcon's id 11; we
        # rather have none than a wrong one.)
        found |= {role: id_ for role, id_ in (("bos", 1), ("eos", 2), ("unk", 0)) if id_ < n_vocab}
    for role, keys in _ID_KEYS.items():
        for key in keys:
            id_ = metadata.get(f"tokenizer.ggml.{key}")
            if id_ is not None and 0 <= int(id_) < n_vocab:
                found[role] = int(id_)
    return found


def load_vocabulary(metadata: Mapping[str, Any], add_bos: bool) -> Vocabulary:
    """Read the vocabulary; `add_bos` is what holds if the file does not say. Raises ModelError."""
    tokens = [token or f"[EMPTY_{id_}]" for id_, token in enumerate(required(metadata, "tokens"))]
    if not tokens:
        raise ModelError("tokenizer.ggml.tokens is empty: the file has no vocabulary")
    ids = {token: id_ for id_, token in enumerate(tokens)}
    types = [int(TokenType.NORMAL)] * len(tokens)
    if "tokenizer.ggml.token_type" in metadata:
        types = [int(type_) for type_ in per_token(metadata, "token_type", len(tokens))]
    for token, type_ in zip(tokens, types, strict=True):
        if type_ == _BYTE and not _BYTE_TOKEN.fullmatch(token):
            raise ModelError(
                f"token '{token}' has the type of a byte but is not of the form <0x0A>: the file is broken"
            )
    special = special_ids_by_key(metadata, len(tokens))
    for role, texts in _ID_TEXTS.items():
        named = next((ids[text] for text in texts if text in ids), None)
        if role not in special and named is not None:
            special[role] = named
            types[named] = TokenType.CONTROL
    vocab = Vocabulary(
        tokens=tokens,
        types=types,
        ids=ids,
        special_ids=special,
        eog_ids=_eog_ids(ids, types, special),
        rstrip=_rstrip(metadata, ids, types),
        add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)),
        add_eos=bool(metadata.get("tokenizer.ggml.add_eos_token", False)),
    )
    for role, wanted in (("bos", vocab.add_bos), ("eos", vocab.add_eos)):
        if wanted and role not in special:
            raise ModelError(f"the file asks for a {role} token but has no tokenizer.ggml.{role}_token_id")
    return vocab


def _eog_ids(ids: Mapping[str, int], types: list[int], special: Mapping[str, int]) -> frozenset[int]:
    """Ids that end a generation. Sets `types` right where the file has them wrong."""
    eog = {special[role] for role in ("fim_pad", "fim_rep", "fim_sep") if role in special}
    for text in _EOG_TEXTS:
        if text in ids:
            eog.add(ids[text])
            types[ids[text]] = TokenType.CONTROL
    for text in _SHOWN_TEXTS:
        if text in ids:
            types[ids[text]] = TokenType.USER_DEFINED
    eog |= {special[role] for role in ("eos", "eot", "eom") if role in special}

    def has(text: str) -> bool:
        return ids.get(text) in eog

    # In the harmony format <|end|> ends a message of an answer, not the answer.
    calls = has("<|call|>") or has("<|calls|>")
    if has("<|end|>") and calls and (has("<|return|>") or has("<|flush|>")):
        eog.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    if has("</s>") and (has("<|tool_response>") or has("<|plamo:eos|>")):
        eog.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
    return frozenset(eog)


def _rstrip(metadata: Mapping[str, Any], ids: Mapping[str, int], types: Sequence[int]) -> frozenset[int]:
    """Special tokens that swallow white space behind them: those of Phi-3, which GGUF has no key for."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    special = {i for i, type_ in enumerate(types) if is_special(type_)} | {ids[t] for t in ("</s>",) if t in ids}
    return frozenset(special - {ids.get(text) for text in ("<unk>", "<s>", "<|endoftext|>")})


def is_special(type_: int) -> bool:
    """Whether tokens of this type are cut out of a text before it is tokenized."""
    return type_ in _SPECIAL
