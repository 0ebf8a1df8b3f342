"""Special tokens, broken metadata and streaming, on small vocabularies made here."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpillama.errors import ModelError, UserError
from mpillama.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_WORD = 259
CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


def metadata(*words: tuple[str, int] | str, **keys: Any) -> dict[str, Any]:
    """An ``llama`` vocabulary of bytes and `words` (normal, or with a type); ids of words begin at FIRST_WORD."""
    typed = [(word, 1) if isinstance(word, str) else word for word in words]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *(word for word, _ in typed)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [type_ for _, type_ in typed], np.int32),
        "tokenizer.ggml.add_space_prefix": False,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def names(tokenizer: Tokenizer, ids: Any) -> list[str]:
    return [tokenizer.token_text(id_) for id_ in ids]


def test_control_tokens_need_parse_special_and_user_defined_do_not() -> None:
    tokenizer = load_tokenizer(metadata(("<ctl>", CONTROL), ("<usr>", USER_DEFINED), "x", add_bos_token=False))
    assert names(tokenizer, tokenizer.encode("x<ctl><usr>x")) == ["x", "<ctl>", "<usr>", "x"]
    plain = tokenizer.encode("<ctl><usr>", parse_special=False)
    assert plain[-1] == tokenizer.vocab.ids["<usr>"]
    assert tokenizer.vocab.ids["<ctl>"] not in plain
    ids = tokenizer.encode("x<ctl><usr>")
    assert tokenizer.decode(ids) == "x<usr>"
    assert tokenizer.decode(ids, special=True) == "x<ctl><usr>"
    assert tokenizer.token_bytes(ids[1]) == b""
    assert tokenizer.token_bytes(ids[1], special=True) == b"<ctl>"


def test_longer_special_tokens_win() -> None:
    tokenizer = load_tokenizer(metadata(("<a>", CONTROL), ("<a><a>b", CONTROL), add_bos_token=False))
    assert names(tokenizer, tokenizer.encode("<a><a><a>b<a>")) == ["<a>", "<a><a>b", "<a>"]


def test_bos_and_eos() -> None:
    assert load_tokenizer(metadata()).encode("") == [1]
    assert load_tokenizer(metadata(add_bos_token=False)).encode("") == []
    assert load_tokenizer(metadata(add_eos_token=True)).encode("") == [1, 2]
    assert load_tokenizer(metadata(add_eos_token=True)).encode("", add_special=False) == []
    assert load_tokenizer(metadata("a", bos_token_id=FIRST_WORD)).encode("") == [FIRST_WORD]


def test_ids_out_of_range_mean_none() -> None:
    tokenizer = load_tokenizer(metadata(padding_token_id=2**32 - 1, eos_token_id=2**32 - 1))
    assert tokenizer.pad_id is None
    assert tokenizer.eos_id == 2


def test_end_of_generation_by_key_and_by_name() -> None:
    words = (("<|eot_id|>", CONTROL), "<|im_end|>", "<|endoftext|>", "stop", "<|fim_pad|>", "<|file_sep|>", "word")
    tokenizer = load_tokenizer(metadata(*words, eom_token_id=FIRST_WORD + 3))
    assert tokenizer.eot_id == FIRST_WORD
    expected = ["</s>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>", "stop", "<|fim_pad|>", "<|file_sep|>"]
    assert names(tokenizer, sorted(tokenizer.eog_ids)) == expected
    # A token of such a name is a control token even if the file calls it a normal one.
    assert tokenizer.decode([FIRST_WORD + 1]) == ""
    assert tokenizer.decode([FIRST_WORD + 6]) == "word"


def test_harmony_end_is_not_the_end() -> None:
    words = [(word, CONTROL) for word in ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")]
    tokenizer = load_tokenizer(metadata(*words, eos_token_id=FIRST_WORD + 1))
    assert {"<|return|>", "<|call|>"} <= set(names(tokenizer, tokenizer.eog_ids))
    assert "<|end|>" not in names(tokenizer, tokenizer.eog_ids)
    assert tokenizer.decode(range(FIRST_WORD, FIRST_WORD + 5)) == "<|end|><|start|><|channel|>"
    alone = load_tokenizer(metadata(("<|end|>", CONTROL)))
    assert "<|end|>" in names(alone, alone.eog_ids)


def test_half_a_surrogate_is_a_replacement_character() -> None:
    tokenizer = load_tokenizer(metadata())
    assert tokenizer.decode(tokenizer.encode("a\udc80b\ud83d\ude00")) == "a\ufffdb😀"


def test_stream_gives_whole_characters() -> None:
    tokenizer = load_tokenizer(metadata())
    ids = [3 + byte for byte in "é😀".encode()]
    stream = StreamDecoder(tokenizer)
    assert [stream.push(id_) for id_ in ids] == ["", "é", "", "", "", "😀"]
    assert stream.flush() == ""


def test_stream_of_bytes_that_are_no_text() -> None:
    tokenizer = load_tokenizer(metadata("a"))
    stream = StreamDecoder(tokenizer)
    ids = [3 + 0xF0, 3 + 0x9F, FIRST_WORD, 3 + 0xFF, 3 + 0xC3]
    pieces = [stream.push(id_) for id_ in ids]
    assert pieces == ["", "", "\ufffda", "\ufffd", ""]
    assert stream.flush() == "\ufffd"
    assert tokenizer.decode(ids) == "\ufffda\ufffd\ufffd"


def test_stream_of_a_continuation_keeps_its_space() -> None:
    tokenizer = load_tokenizer(metadata("▁a", add_space_prefix=True))
    start, middle = StreamDecoder(tokenizer), StreamDecoder(tokenizer, continues=True)
    ids = [1, FIRST_WORD, FIRST_WORD]
    assert "".join(map(start.push, ids)) == tokenizer.decode(ids) == "a a"
    assert "".join(map(middle.push, ids)) == " a a"


def test_unused_tokens_are_silent() -> None:
    assert load_tokenizer(metadata(("[PAD7]", UNUSED))).decode([FIRST_WORD]) == ""


@pytest.mark.parametrize("id_", [-1, FIRST_WORD])
def test_no_such_token(id_: int) -> None:
    tokenizer = load_tokenizer(metadata())
    with pytest.raises(UserError, match=rf"no token {id_}: .* 0 to 258"):
        tokenizer.decode([id_])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"model": None}, "no usable tokenizer .no tokenizer.ggml.model"),
        ({"model": "none"}, "no usable tokenizer .* token ids only"),
        ({"model": "bert"}, "'bert' is not supported; supported are 'llama' and 'gpt2'"),
        ({"tokens": None}, "has no tokenizer.ggml.tokens"),
        ({"tokens": []}, "tokenizer.ggml.tokens is empty"),
        ({"scores": None}, "has no tokenizer.ggml.scores"),
        ({"scores": np.zeros(7)}, "scores has 7 entries for 259 tokens"),
        ({"token_type": np.zeros(7)}, "token_type has 7 entries for 259 tokens"),
        ({"token_type": np.full(259, 6)}, "token '<unk>' has the type of a byte"),
        ({"model": "gpt2", "merges": None}, "has no tokenizer.ggml.merges"),
        ({"model": "gpt2", "merges": [], "add_bos_token": True}, "asks for a bos token but has no"),
        ({"model": "gpt2", "merges": [], "pre": "nonesuch"}, "pre 'nonesuch' is not supported"),
    ],
)
def test_broken_metadata(keys: dict[str, Any], message: str) -> None:
    broken = {key: value for key, value in metadata(**keys).items() if value is not None}
    with pytest.raises(ModelError, match=message) as caught:
        load_tokenizer(broken)
    assert "\n" not in str(caught.value)


def test_vocabulary_without_bytes() -> None:
    small = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", "▁a"],
        "tokenizer.ggml.scores": np.zeros(4),
    }
    assert load_tokenizer(small).encode("aé") == [1, 3, 0, 0]


def test_tokens_that_are_not_utf8() -> None:
    odd = b"\xff\xfe".decode("utf-8", "surrogateescape")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁a", odd]
    types = np.array([2, 3, 3] + [6] * 256 + [1, 1], np.int32)
    keys = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    keys |= {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    scores = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": np.zeros(len(tokens), np.float32)}
    assert load_tokenizer(keys | scores).token_bytes(len(tokens) - 1) == b"\xff\xfe"
    with pytest.raises(ModelError, match=f"token {len(tokens) - 1} of the vocabulary is not UTF-8"):
        load_tokenizer(
            keys | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.merges": []}
        )
