"""Merging against slow references, on random vocabularies and texts."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import regex

from mpillama.errors import ModelError
from mpillama.tokenizer import load_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GPT2 = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")


def characters() -> list[str]:
    """GPT-2's stand-in for each byte, in the order of the bytes."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def random_words(rng: np.random.Generator, alphabet: str, count: int, longest: int) -> list[str]:
    lengths = rng.integers(1, longest + 1, count)
    return ["".join(rng.choice(list(alphabet), length)) for length in lengths]


def spm_metadata(rng: np.random.Generator, alphabet: str) -> dict[str, Any]:
    words = sorted({"▁", *random_words(rng, alphabet, 60, 5)})  # a space of its own is in every real vocabulary
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *words]
    # Few different scores, so that ties are common.
    scores = np.concatenate([np.zeros(259), -rng.integers(1, 9, len(words))]).astype(np.float32)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(words), np.int32),
    }


def spm_reference(metadata: dict[str, Any], text: str) -> list[int]:
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    scores = metadata["tokenizer.ggml.scores"]
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joints = [(scores[ids[a + b]], -i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not joints:
            break
        i = -max(joints)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [i for part in parts for i in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


def test_spm_is_the_slow_reference(rng: np.random.Generator) -> None:
    for _ in range(20):
        metadata = spm_metadata(rng, "ab▁é")
        tokenizer = load_tokenizer(metadata)
        for text in random_words(rng, "aaabbb é猫 ", 30, 60):
            ids = tokenizer.encode(text)
            assert ids == [1, *spm_reference(metadata, text)]
            assert tokenizer.decode(ids) == text


def test_spm_text_never_becomes_a_control_token() -> None:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, "</", "s>", "<", "/", "s", ">", "a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-1, -2, -3, -3, -3, -3, -3]),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * 7),
        "tokenizer.ggml.add_space_prefix": False,
    }
    tokenizer = load_tokenizer(metadata)
    assert tokenizer.encode("a</s>", add_special=False) == [265, 2]
    assert tokenizer.encode("a</s>", add_special=False, parse_special=False) == [265, 259, 260]


def bpe_metadata(rng: np.random.Generator) -> dict[str, Any]:
    """Every merge joins two tokens that are there already, as in a trained vocabulary."""
    tokens = characters()
    merges: list[str] = []
    seeds = [characters()[byte] for byte in " abc'sé猫".encode()]
    while len(merges) < 60:
        left, right = rng.choice(seeds + tokens[256:], 2)
        if left + right not in tokens:
            tokens.append(left + right)
            merges.append(f"{left} {right}")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
    }


def bpe_reference(metadata: dict[str, Any], text: str) -> list[int]:
    ids = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(metadata["tokenizer.ggml.merges"])}
    found: list[int] = []
    for word in GPT2.findall(text):
        parts = [characters()[byte] for byte in word.encode()]
        while ranked := [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks]:
            i = min(ranked)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        found += [ids[part] for part in parts]
    return found


def test_bpe_is_the_slow_reference(rng: np.random.Generator) -> None:
    for _ in range(10):
        metadata = bpe_metadata(rng)
        tokenizer = load_tokenizer(metadata)
        for text in random_words(rng, "aabbc 's é猫12\n ", 20, 40):
            ids = tokenizer.encode(text)
            assert ids == bpe_reference(metadata, text)
            assert tokenizer.decode(ids) == text


def test_bpe_ignores_merges_where_the_model_does() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*characters(), "ab", "abc"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.add_bos_token": False,
    }
    assert load_tokenizer(metadata | {"tokenizer.ggml.pre": "smaug-bpe"}).encode("abc") == [256, ord("c")]
    assert load_tokenizer(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).encode("abc") == [257]


def test_bpe_merge_without_token() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": characters(),
        "tokenizer.ggml.merges": ["a b"],
    }
    with pytest.raises(ModelError, match=r"merges does not fit .*tokens"):
        load_tokenizer(metadata)


def test_bpe_characters_that_stand_for_no_byte_mean_themselves() -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": [*characters(), "<｜é▁x｜>"],
        "tokenizer.ggml.merges": [],
    }
    # é is the stand-in of byte 0xE9, which is no UTF-8 by itself; ｜ and ▁ stand for nothing.
    assert load_tokenizer(metadata).token_bytes(256) == "<｜".encode() + b"\xe9" + "▁x｜>".encode()
