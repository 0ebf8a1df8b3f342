"""How byte-level BPE cuts a text into pieces before merging: one entry for each ``tokenizer.ggml.pre`` name.

The names and their rules are llama.cpp's (``src/llama-vocab.cpp``), written for the Oniguruma engine of
``tokenizers``. A text is cut by the expressions one after the other: each cuts the pieces that the ones before it left,
and what matches nothing stays a piece. llama.cpp knows letter case in ASCII only, so where the published expression of
a model asks for upper or lower case its rule, and ours, takes letters that are not of ASCII's other case.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mpillama.errors import ModelError


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions in their order, and what goes with them.

    `ignore_merges`: a piece that is a token is that token, whatever the merges say. `add_bos`: a BOS token is added
    unless the file says otherwise.
    """

    regexes: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


def _either(*alternatives: str) -> str:
    """An expression for the first of the alternatives that matches."""
    return "|".join(alternatives)


_CONTRACTION = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SYMBOLS_OR_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*"
_SPACE = r"\s+(?!\S)|\s+"
_SPACES = _either(r"\s*[\r\n]+", _SPACE)

_GPT2 = _either(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+", _SPACE)
_LLAMA3 = _either(_CONTRACTION, _WORD, r"\p{N}{1,3}", _SYMBOLS, _SPACES)
_MINICPM5 = _either(_CONTRACTION, _WORD, r"\p{N}+", _SYMBOLS, _SPACES)
_QWEN2 = _either(_CONTRACTION, _WORD, r"\p{N}", _SYMBOLS, _SPACES)
_QWEN35 = _either(
    _CONTRACTION, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*", _SPACES
)
_UFAKZEKA = _either(_WORD, r"\p{N}", _SYMBOLS, _SPACES)
_SEED_CODER = _either(_CONTRACTION, _WORD, r"\p{N}", r" ?[^\s\p{L}\p{N}\r\n]+", _SPACES)
_BAILING = _either(r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])", _WORD, r"\p{N}", _SYMBOLS, r"\s*[\r\n]", _SPACE)
_NOT_LOWER = r"[\p{L}&&[^a-z]]"
_NOT_UPPER = r"[\p{L}&&[^A-Z]]"
_LEAD = r"[^\r\n\p{L}\p{N}]?"
# Upper case, then lower case; either may be missing, not both.
_LOWER_WORD = f"{_LEAD}{_NOT_LOWER}*{_NOT_UPPER}+"
_UPPER_WORD = f"{_LEAD}{_NOT_LOWER}+{_NOT_UPPER}*"
_GPT4O = _either(
    f"{_LOWER_WORD}{_CONTRACTION}?", f"{_UPPER_WORD}{_CONTRACTION}?", r"\p{N}{1,3}", _SYMBOLS_OR_SLASH, _SPACES
)
_TEKKEN = _either(_LOWER_WORD, _UPPER_WORD, r"\p{N}", _SYMBOLS_OR_SLASH, _SPACES)

# Ranges of characters never stand for white space here: llama.cpp takes that out of the text first.
_DEEPSEEK_LETTERS = (
    r"A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώ"
    r"ᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏"
    r"𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃"
)
_DEEPSEEK_CJK = r"[一-龥ࠀ-一가-퟿&&\S]+"
_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    r"\s?[!-/:-~！-／：-～‘-‟　-。&&\S]+",
    r"\s+$",
    _DEEPSEEK_CJK,
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _DEEPSEEK_CJK, r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    _either(
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
        r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
        r" ?[\p{P}\p{S}]+[\r\n]*",
        _SPACES,
    ),
)
_POROUS = r" ?[^(\s|.,!?…。，、।۔،)]+"


def _entries() -> Iterator[tuple[str, PreTokenizer]]:
    """Every name with its rule."""

    def same(
        names: str, *regexes: str, ignore_merges: bool = False, add_bos: bool = False
    ) -> Iterator[tuple[str, PreTokenizer]]:
        return ((name, PreTokenizer(regexes, ignore_merges, add_bos)) for name in names.split())

    yield from same("default", r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")
    yield from same(
        "gpt-2 phi-2 gigachat a.x-4.0 mellum mpt olmo jais trillion granite-docling exaone4 modern-bert "
        "jina-es jina-de jina-v2-es jina-v2-de",
        _GPT2,
    )
    yield from same(
        "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano",
        _LLAMA3,
        ignore_merges=True,
        add_bos=True,
    )
    yield from same("dbrx smaug-bpe chatglm-bpe", _LLAMA3)
    yield from same("glm4 glm5", _LLAMA3, ignore_merges=True)
    yield from same("minicpm5", r"\p{N}{1,3}", _MINICPM5, ignore_merges=True)
    yield from same("qwen2 deepseek-r1-qwen kormo f2llmv2 megrez stablelm2 hunyuan solar-open grok-2", _QWEN2)
    yield from same("qwen35", _QWEN35)
    yield from same("laguna", r"[^\n]+|[\n]+", _QWEN2)
    yield from same("ufakzeka", _UFAKZEKA)
    yield from same("seed-coder", _SEED_CODER)
    yield from same("bailingmoe bailingmoe2 llada-moe", _BAILING)
    yield from same("starcoder refact command-r smollm codeshell exaone minerva-7b mellum2", r"\p{N}", _GPT2)
    yield from same("falcon", r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")
    yield from same("deepseek-llm", *_DEEPSEEK_LLM)
    yield from same("deepseek-coder", *_DEEPSEEK_CODER)
    yield from same("deepseek-v3 hunyuan-dense joyai-llm hy_v4", *_DEEPSEEK_V3)
    yield from same("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O)
    yield from same("tekken", _TEKKEN, ignore_merges=True, add_bos=True)
    yield from same("poro-chat bloom gpt3-finnish", _POROUS)
    yield from same("viking", _POROUS, r"\p{N}")


PRE_TOKENIZERS: Mapping[str, PreTokenizer] = MappingProxyType(dict(_entries()))


def pre_tokenizer(name: str) -> PreTokenizer:
    """The rule of a ``tokenizer.ggml.pre`` name; ModelError if it is unknown."""
    if name not in PRE_TOKENIZERS:
        raise ModelError(
            f"tokenizer.ggml.pre '{name}' is not supported; supported are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]
