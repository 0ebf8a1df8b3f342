"""The demo model's tokenizer: byte-level BPE, the kind that GGUF calls `gpt2`.

Text is split as GPT-2 does (`tokenizer.ggml.pre = gpt-2`) and each piece is written in the 256 characters that
stand for bytes, so every Unicode text has ids and comes back unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"  # id 0; ends a story, and also begins one, as in GPT-2


def train(texts: Iterable[str], n_vocab: int) -> Tokenizer:
    """Learn exactly n_vocab tokens, END_OF_TEXT first; raises ValueError if the texts do not hold that many."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != n_vocab:
        raise ValueError(f"the texts give only {tokenizer.get_vocab_size()} of {n_vocab} tokens: use more stories")
    return tokenizer


def tokens_and_merges(tokenizer: Tokenizer) -> tuple[list[str], list[str]]:
    """The tokens by id, and the merges as "left right" by rank: what GGUF wants."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    return tokens, [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]


def from_tokens(tokens: list[str], merges: list[str]) -> Tokenizer:
    """The tokenizer that a GGUF file describes."""
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer
