"""The rules that cut a text before BPE, on one text that tells most of them apart; the pieces are llama.cpp's."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Regex, pre_tokenizers

from mpillama.errors import ModelError
from mpillama.tokenizer.pre import PRE_TOKENIZERS, pre_tokenizer

TEXT = "I'LL it's aBc Éa 1234  \n\n x\u3000中文。k! /\r\n\te\u0301 (b)$5"
PIECES = {
    "default": "I¦'¦LL¦ it¦'¦s¦ aBc¦ Éa¦ ¦123¦4¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ ¦/¦\r\n¦\t¦e¦\u0301¦ ¦(¦b¦)$¦5",
    "gpt-2": "I¦'¦LL¦ it¦'s¦ aBc¦ Éa¦ 1234¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ /¦\r\n¦\t¦e¦\u0301¦ (¦b¦)$¦5",
    "llama-bpe": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦123¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "minicpm5": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦123¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "qwen2": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "qwen35": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te\u0301¦ (¦b¦)$¦5",
    "laguna": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  ¦\n\n¦ x¦\u3000中文¦。k¦!¦ /\r¦\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "ufakzeka": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "seed-coder": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /¦\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "bailingmoe": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "starcoder": "I¦'¦LL¦ it¦'s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ /¦\r\n¦\t¦e¦\u0301¦ (¦b¦)$¦5",
    "falcon": "I¦'¦LL¦ it¦'¦s¦ aBc¦ Éa¦ ¦123¦4¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ ¦/¦\r\n¦\t¦e¦\u0301¦ ¦(¦b¦)$¦5",
    "deepseek-llm": "I¦'¦LL¦ it¦'¦s¦ aBc¦ É¦a¦ ¦1234¦  ¦\n¦\n¦ x¦\u3000¦中文¦。¦k¦!¦ /¦\r¦\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "deepseek-coder": "I¦'¦LL¦ it¦'¦s¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  ¦\n¦\n¦ x¦\u3000¦中文¦。¦k¦!¦ /¦\r¦\n¦\te¦\u0301¦ (¦b¦)¦$¦5",
    "deepseek-v3": "I¦'LL¦ it¦'s¦ aBc¦ Éa¦ ¦123¦4¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ /\r\n¦\te\u0301¦ (¦b¦)$¦5",
    "gpt-4o": "I'LL¦ it's¦ a¦Bc¦ Éa¦ ¦123¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "tekken": "I¦'LL¦ it¦'s¦ a¦Bc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000中文¦。k¦!¦ /\r\n¦\te¦\u0301¦ (¦b¦)$¦5",
    "poro-chat": "I'LL¦ it's¦ aBc¦ Éa¦ 1234¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ /¦\r\n\t¦e\u0301¦ (¦b¦)¦$5",
    "viking": "I'LL¦ it's¦ aBc¦ Éa¦ ¦1¦2¦3¦4¦  \n\n¦ x¦\u3000¦中文¦。¦k¦!¦ /¦\r\n\t¦e\u0301¦ (¦b¦)¦$¦5",
}


def cut(name: str, text: str) -> list[str]:
    regexes = pre_tokenizer(name).regexes
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes]
    return [piece for piece, _ in pre_tokenizers.Sequence(splits).pre_tokenize_str(text)]


@pytest.mark.parametrize("name", PIECES)
def test_pieces(name: str) -> None:
    assert cut(name, TEXT) == PIECES[name].split("¦")


def test_every_rule_is_covered() -> None:
    assert {rule.regexes for rule in PRE_TOKENIZERS.values()} == {pre_tokenizer(name).regexes for name in PIECES}


@pytest.mark.parametrize("name", PIECES)
def test_nothing_is_lost(name: str, rng: np.random.Generator) -> None:
    points = rng.choice([*range(0xD800), *range(0xE000, 0x110000)], 2000)
    text = "".join(chr(point) + " \n"[: rng.integers(3)] for point in points)
    assert "".join(cut(name, text)) == text


def test_flags() -> None:
    assert pre_tokenizer("llama-bpe").ignore_merges
    assert pre_tokenizer("llama-bpe").add_bos
    assert not pre_tokenizer("smaug-bpe").ignore_merges
    assert pre_tokenizer("smaug-bpe").regexes == pre_tokenizer("llama3").regexes
    assert pre_tokenizer("tekken").ignore_merges
    assert not pre_tokenizer("gpt-4o").add_bos


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ModelError, match=r"'nonesuch' is not supported; supported are .*deepseek-v3.*qwen2.*tekken"):
        pre_tokenizer("nonesuch")
