"""Real vocabularies: llama.cpp's own test vectors, a trained model's prompt, and round trips of any Unicode text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillama.errors import ModelError
from mpillama.gguf.reader import read_header
from mpillama.tokenizer import StreamDecoder, Tokenizer, load_tokenizer
from shared import shared

NAMES = ("deepseek-coder", "gpt-2", "llama-bpe", "llama-spm", "phi-3", "qwen2", "qwen35")
SPM_SPACE = "▁"  # stands for a space in these vocabularies, and comes back as one
AWKWARD = (
    "👩‍👩‍👧‍👦",
    "e\u0301\u0323",
    "\u200f",
    "\ufeff",
    "\x00",
    "\x1b",
    "\u0085",
    "\u2028",
    "\r",
    "\n",
    "\n\n",
    "  ",
    "\t",
    "'S",
    "12",
)


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[str, Tokenizer]:
    path = shared("vocab", f"ggml-vocab-{request.param}.gguf")
    return str(path), load_tokenizer(read_header(path).metadata)


def random_text(rng: np.random.Generator) -> str:
    """Characters of all planes between plain words, with awkward ones and runs of spaces."""
    parts: list[str] = []
    for kind in rng.choice(5, 80):
        point = int(
            rng.choice([rng.integers(0x80), rng.integers(0x3000), rng.integers(0x10000), rng.integers(0x110000)])
        )
        parts.append((chr(point), "word", " " * rng.integers(4), str(rng.choice(AWKWARD)), str(point))[kind])
    return "".join(parts).encode("utf-8", "ignore").decode()


def assert_comes_back(tokenizer: Tokenizer, text: str) -> None:
    text = text.replace(SPM_SPACE, "_") if tokenizer.space_prefix else text
    ids = tokenizer.encode(text, parse_special=False)
    assert tokenizer.decode(ids) == text
    stream = StreamDecoder(tokenizer)
    pieces = [stream.push(id_) for id_ in ids]
    assert "".join(pieces) == text  # whole characters only, and all of them before the end
    assert stream.flush() == ""


def test_vectors(case: tuple[str, Tokenizer]) -> None:
    path, tokenizer = case
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    with open(f"{path}.out", encoding="utf-8") as file:
        expected = [[int(id_) for id_ in line.split()] for line in file.read().split("\n")]
    assert len(texts) == len(expected) > 40
    for text, ids in zip(texts, expected, strict=True):
        assert tokenizer.encode(text, add_special=False) == ids, text


def test_random_text_comes_back(case: tuple[str, Tokenizer], rng: np.random.Generator) -> None:
    for _ in range(50):
        assert_comes_back(case[1], random_text(rng))


@settings(max_examples=50)
@given(text=st.text())
def test_any_text_comes_back(case: tuple[str, Tokenizer], text: str) -> None:
    assert_comes_back(case[1], text)


def test_special_tokens(case: tuple[str, Tokenizer]) -> None:
    _, tokenizer = case
    for id_ in sorted(tokenizer.eog_ids):
        text = tokenizer.token_text(id_)
        assert tokenizer.encode(text, add_special=False) == [id_]
        assert id_ not in tokenizer.encode(text, parse_special=False)[1:]
        assert tokenizer.decode([id_]) == ""
        assert tokenizer.decode([id_], special=True) == text


def test_eog_ids() -> None:
    def eog(name: str) -> set[str]:
        tokenizer = load_tokenizer(read_header(shared("vocab", f"ggml-vocab-{name}.gguf")).metadata)
        return {tokenizer.token_text(id_) for id_ in tokenizer.eog_ids}

    assert eog("llama-bpe") == {"<|end_of_text|>", "<|eot_id|>"}
    assert eog("phi-3") == {"</s>", "<|endoftext|>", "<|end|>"}
    assert eog("gpt-2") == {"<|endoftext|>"}


def test_phi3_swallows_spaces_behind_special_tokens() -> None:
    tokenizer = load_tokenizer(read_header(shared("vocab", "ggml-vocab-phi-3.gguf")).metadata)
    ids = tokenizer.encode("<|user|>\n Hi<|end|>\n<|assistant|>\n")
    assert [tokenizer.token_text(id_) for id_ in ids] == ["<s>", "<|user|>", "▁Hi", "<|end|>", "<|assistant|>"]


def test_trained_model() -> None:
    folder = shared("models", "stories260K")
    tokenizer = load_tokenizer(read_header(folder / "stories260K-f32.gguf").metadata)
    reference: dict[str, Any] = json.loads((folder / "reference.json").read_text())
    assert tokenizer.encode(reference["prompt"]) == reference["prompt_ids"]
    assert tokenizer.decode(reference["prompt_ids"]) == reference["prompt"]


def test_file_without_tokenizer() -> None:
    metadata = read_header(shared("golden", "llama-dense.gguf")).metadata
    with pytest.raises(ModelError, match=r"no usable tokenizer .*'test'.* token ids only"):
        load_tokenizer(metadata)
