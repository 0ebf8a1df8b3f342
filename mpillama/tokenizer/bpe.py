"""Byte-level BPE (``tokenizer.ggml.model`` = ``gpt2``): cut by regular expressions, then merge the bytes of a piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from mpillama.errors import ModelError
from mpillama.tokenizer.base import Tokenizer
from mpillama.tokenizer.pre import PreTokenizer, pre_tokenizer
from mpillama.tokenizer.vocabulary import Vocabulary, load_vocabulary, required, utf8


class BPETokenizer(Tokenizer):
    """Merges and regular expressions run in Hugging Face's ``tokenizers``; special tokens are cut out before, by us.

    `merges`: pairs as ``"left right"``, the first to be merged first.
    """

    def __init__(self, vocab: Vocabulary, merges: Sequence[str], pre: PreTokenizer) -> None:
        super().__init__(vocab)
        unique = dict.fromkeys(merges)  # a pair that comes twice keeps its first rank
        pairs = [(merge[:space], merge[space + 1 :]) for merge in unique for space in (merge.find(" ", 1),)]
        try:
            model = models.BPE(vocab=dict(vocab.ids), merges=pairs, ignore_merges=pre.ignore_merges)
        except Exception as error:  # the library raises nothing narrower
            odd = next((i for i, token in enumerate(vocab.tokens) if not _is_utf8(token)), None)
            if odd is not None:
                raise ModelError(f"token {odd} of the vocabulary is not UTF-8 text; convert the model again") from None
            raise ModelError(f"tokenizer.ggml.merges does not fit tokenizer.ggml.tokens: {error}") from error
        self._bpe = HFTokenizer(model)
        self._bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(regex), "isolated") for regex in pre.regexes),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._byte_of = _byte_of_character()

    def _encode_text(self, text: str) -> list[int]:
        return self._bpe.encode(text, add_special_tokens=False).ids

    def _decode_token(self, token: str) -> bytes:
        byte_of = self._byte_of
        # Characters that stand for no byte come from tokens added by hand; they mean themselves.
        return b"".join(byte_of.get(character) or utf8(character) for character in token)


def load_bpe(metadata: Mapping[str, Any]) -> BPETokenizer:
    """The tokenizer of metadata whose ``tokenizer.ggml.model`` is ``gpt2``. Raises ModelError."""
    pre = pre_tokenizer(metadata.get("tokenizer.ggml.pre") or "default")
    return BPETokenizer(load_vocabulary(metadata, pre.add_bos), required(metadata, "merges"), pre)


def _is_utf8(token: str) -> bool:
    return token == utf8(token).decode("utf-8", "replace")


def _byte_of_character() -> dict[str, bytes]:
    """GPT-2's printable stand-ins: a byte that prints is itself, the n-th of the others is character 256 + n."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    table = {chr(byte): bytes((byte,)) for byte in printable}
    return table | {chr(256 + n): bytes((byte,)) for n, byte in enumerate(others)}
