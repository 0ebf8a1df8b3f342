"""SentencePiece-like tokenizer (``tokenizer.ggml.model`` = ``llama``): merges by score, unknown characters as bytes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import Any

from mpillama.errors import ModelError
from mpillama.tokenizer.base import Tokenizer
from mpillama.tokenizer.vocabulary import TokenType, Vocabulary, load_vocabulary, per_token, utf8

_SPACE = "▁"
_WORDS_REMEMBERED = 1 << 16


class SPMTokenizer(Tokenizer):
    """Merges the neighbours whose joint token has the best score, the leftmost first, until there are none.

    `scores`: one per token, in nats or just minus a rank; higher is merged earlier. `space_prefix` puts a space before
    the text and after every special token.
    """

    def __init__(self, vocab: Vocabulary, scores: Sequence[float], space_prefix: bool) -> None:
        super().__init__(vocab)
        self.space_prefix = space_prefix
        # Text must never become a control token by merges; only `parse_special` may do that.
        never = (TokenType.CONTROL, TokenType.UNKNOWN)
        self._scores = {t: scores[i] for t, i in vocab.ids.items() if vocab.types[i] not in never}
        self._inner_pairs = {a + b for token in self._scores for a, b in pairwise(token)}
        self._byte_ids = _byte_ids(vocab)
        self._word_ids = lru_cache(_WORDS_REMEMBERED)(self._merge)

    def _encode_text(self, text: str) -> list[int]:
        text = (" " + text if self.space_prefix else text).replace(" ", _SPACE)
        return [id_ for word in self._words(text) for id_ in self._word_ids(word)]

    def _decode_token(self, token: str) -> bytes:
        return utf8(token.replace(_SPACE, " "))

    def _words(self, text: str) -> Iterator[str]:
        """Cut where no token can reach across, since the two characters there are neighbours in no token.

        No merge on one side depends on the other side, so words can be merged alone and remembered.
        """
        inner = self._inner_pairs
        start = 0
        for i, (a, b) in enumerate(pairwise(text), 1):
            if a + b not in inner:
                yield text[start:i]
                start = i
        yield text[start:]

    def _merge(self, word: str) -> tuple[int, ...]:
        """Ids of one word, by a queue of candidate merges; O(n log n) in its length."""
        scores = self._scores
        parts = list(word)  # a part that was merged into its left neighbour is ""
        left_of = list(range(-1, len(parts) - 1))
        right_of = [*range(1, len(parts)), -1]
        queue = [
            (-scores[joint], i, i + 1, joint) for i, joint in enumerate(map("".join, pairwise(word))) if joint in scores
        ]
        heapify(queue)
        while queue:
            _, left, right, joint = heappop(queue)
            if not parts[left] or not parts[right] or parts[left] + parts[right] != joint:
                continue
            parts[left], parts[right] = joint, ""
            after = right_of[left] = right_of[right]
            if after >= 0:
                left_of[after] = left
            before = left_of[left]
            for a, b in ((before, left), (left, after)):
                if a >= 0 and b >= 0:
                    joint = parts[a] + parts[b]
                    if joint in scores:
                        heappush(queue, (-scores[joint], a, b, joint))
        ids: list[int] = []
        for part in filter(None, parts):
            if part in scores:
                ids.append(self.vocab.ids[part])
            else:
                ids.extend(self._byte_ids[byte] for byte in part.encode())
        return tuple(ids)


def load_spm(metadata: Mapping[str, Any]) -> SPMTokenizer:
    """The tokenizer of metadata whose ``tokenizer.ggml.model`` is ``llama``. Raises ModelError."""
    vocab = load_vocabulary(metadata, add_bos=True)
    scores = [float(score) for score in per_token(metadata, "scores", len(vocab.tokens))]
    return SPMTokenizer(vocab, scores, bool(metadata.get("tokenizer.ggml.add_space_prefix", True)))


def _byte_ids(vocab: Vocabulary) -> list[int]:
    """Id of the token of each byte: ``<0x0A>``, or the character itself, or the unknown token."""
    found: list[int] = []
    for byte in range(256):
        names = (f"<0x{byte:02X}>", *([chr(byte)] if byte < 128 else []))
        id_ = next((vocab.ids[name] for name in names if name in vocab.ids), vocab.special_ids.get("unk"))
        if id_ is None:
            raise ModelError(f"the vocabulary has neither {names[0]} nor an unknown token: the file is broken")
        found.append(id_)
    return found
