"""The demo model that comes with the package, and the generator of the stories it was trained on."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import ModuleType

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mpillama.data import demo_model_path
from mpillama.gguf.reader import GGUFHeader, read_header
from mpillama.tokenizer import load_tokenizer

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_demo"
BLOCK = 32  # weights in a Q8_0 block
N_STORIES = 1000


@pytest.fixture(scope="module")
def header() -> GGUFHeader:
    return read_header(demo_model_path())


def test_file_is_small() -> None:
    assert 1_000_000 < demo_model_path().stat().st_size < 8_000_000


def test_metadata_says_what_it_is(header: GGUFHeader) -> None:
    assert header.metadata["general.architecture"] == "llama"
    assert header.metadata["general.license"] == "MIT"
    assert header.metadata["general.name"]
    assert header.metadata["general.description"]


@pytest.mark.parametrize("n_ranks", [2, 3, 4])
def test_widths_split_evenly_on_whole_blocks(header: GGUFHeader, n_ranks: int) -> None:
    def key(name: str) -> int:
        return int(header.metadata[f"llama.{name}"])

    assert key("attention.head_count") % n_ranks == 0
    assert key("attention.head_count_kv") % n_ranks == 0
    assert key("attention.key_length") % BLOCK == 0
    for width in (
        key("attention.head_count") * key("attention.key_length"),
        key("feed_forward_length"),
        key("vocab_size"),
    ):
        assert width % (n_ranks * BLOCK) == 0


def test_tensors_are_those_of_the_metadata(header: GGUFHeader) -> None:
    n_embd, n_ff = int(header.metadata["llama.embedding_length"]), int(header.metadata["llama.feed_forward_length"])
    width = int(header.metadata["llama.attention.head_count"]) * int(header.metadata["llama.attention.key_length"])
    shapes = {
        "attn_norm": (n_embd,),
        "attn_q": (n_embd, width),
        "attn_k": (n_embd, width),
        "attn_v": (n_embd, width),
        "attn_output": (width, n_embd),
        "ffn_norm": (n_embd,),
        "ffn_gate": (n_embd, n_ff),
        "ffn_up": (n_embd, n_ff),
        "ffn_down": (n_ff, n_embd),
    }
    want = {"token_embd.weight": (n_embd, int(header.metadata["llama.vocab_size"])), "output_norm.weight": (n_embd,)}
    for il in range(int(header.metadata["llama.block_count"])):
        want |= {f"blk.{il}.{name}.weight": shape for name, shape in shapes.items()}
    assert {name: tuple(info.shape) for name, info in header.tensors.items()} == want


@pytest.fixture(scope="module")
def tokenizer(header: GGUFHeader) -> Tokenizer:
    """The tokenizer as the file describes it, in the library that trained it."""
    tokens = list(header.metadata["tokenizer.ggml.tokens"])
    merges = [tuple(str(merge).split(" ")) for merge in header.metadata["tokenizer.ggml.merges"]]
    vocab = {str(token): index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_vocabulary_is_consistent(header: GGUFHeader) -> None:
    metadata = header.metadata
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    assert metadata["tokenizer.ggml.model"] == "gpt2"
    assert metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert len(tokens) == len(types) == metadata["llama.vocab_size"]
    assert len(set(tokens)) == len(tokens)
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokens)
    end = metadata["tokenizer.ggml.eos_token_id"]
    assert metadata["tokenizer.ggml.bos_token_id"] == end
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert tokens[end] == "<|endoftext|>"
    assert [index for index, kind in enumerate(types) if kind != 1] == [end]
    known = set(tokens)
    for merge in metadata["tokenizer.ggml.merges"]:
        left, right = str(merge).split(" ")
        assert {left, right, left + right} <= known


@pytest.fixture
def any_texts(rng: np.random.Generator) -> list[str]:
    """Texts of random code points of all of Unicode, each with some spaces, letters and marks."""
    points = ([p for p in rng.integers(1, 0x110000, size=40) if not 0xD800 <= p < 0xE000] for _ in range(50))
    return ["".join(map(chr, some)) + "\n\n  naïve 東京 🦊 don't" for some in points]


def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, any_texts: list[str]) -> None:
    for text in any_texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_ids_are_those_of_the_training(
    header: GGUFHeader, tokenizer: Tokenizer, any_texts: list[str], texts: list[str]
) -> None:
    ours = load_tokenizer(header.metadata)
    for text in [*any_texts, *texts[:100], "", " ", "Once upon a time"]:
        ids = tokenizer.encode(text).ids
        assert ours.encode(text) == [ours.bos_id, *ids]
        assert ours.decode(ids) == text
    assert ours.eog_ids == {ours.bos_id}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """The package `stories` of the example."""
    sys.path.insert(0, str(EXAMPLE))
    try:
        import stories
    finally:
        sys.path.remove(str(EXAMPLE))
    return stories


@pytest.fixture
def texts(generator: ModuleType, rng: np.random.Generator) -> list[str]:
    first = int(rng.integers(0, 2**31))
    return [generator.story(first + i) for i in range(N_STORIES)]


def nats_per_token(path: Path, ids: list[int]) -> float:
    """Mean cross entropy of ids[1:], in NumPy, from the file alone, with the arithmetic of architecture `llama`."""
    reader = gguf.GGUFReader(path)
    w = {t.name.removesuffix(".weight"): gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    meta = {key.removeprefix("llama."): field.contents() for key, field in reader.fields.items()}
    n_head, head_dim = meta["attention.head_count"], meta["attention.key_length"]
    n = len(ids) - 1
    theta = np.arange(n)[:, None] * meta["rope.freq_base"] ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * theta)  # the pair (2i, 2i + 1) of a head as one complex number

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + meta["attention.layer_norm_rms_epsilon"]) * weight

    def rotated(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., 0::2] + 1j * x[..., 1::2]) * turn
        return np.stack((pairs.real, pairs.imag), -1).reshape(x.shape)

    x = w["token_embd"][ids[:-1]]
    for il in range(meta["block_count"]):
        b = {name.removeprefix(f"blk.{il}."): weight for name, weight in w.items() if name.startswith(f"blk.{il}.")}
        h = norm(x, b["attn_norm"])
        q, k, v = ((h @ b[f"attn_{m}"].T).reshape(n, n_head, head_dim).swapaxes(0, 1) for m in "qkv")
        scores = rotated(q) @ rotated(k).swapaxes(1, 2) / np.sqrt(head_dim)
        p = np.exp(np.where(np.tri(n, dtype=bool), scores, -np.inf))
        x = x + (p / p.sum(-1, keepdims=True) @ v).swapaxes(0, 1).reshape(n, -1) @ b["attn_output"].T
        h = norm(x, b["ffn_norm"])
        gate = h @ b["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ b["ffn_up"].T)) @ b["ffn_down"].T
    logits = norm(x, w["output_norm"]) @ w["token_embd"].T
    return float((np.log(np.exp(logits).sum(-1)) - logits[np.arange(n), ids[1:]]).mean())


def test_model_knows_stories_it_has_not_seen(header: GGUFHeader, tokenizer: Tokenizer, texts: list[str]) -> None:
    end = int(header.metadata["tokenizer.ggml.eos_token_id"])
    stories = [[end, *tokenizer.encode(text).ids, end] for text in texts[:8]]
    shuffled = [[end, *reversed(ids[1:-1]), end] for ids in stories]
    path = demo_model_path()
    assert np.mean([nats_per_token(path, ids) for ids in stories]) < 1.2
    assert np.mean([nats_per_token(path, ids) for ids in shuffled[:2]]) > 4


def test_generator_needs_no_torch() -> None:
    for file in (EXAMPLE / "stories").glob("*.py"):
        assert "torch" not in file.read_text(encoding="utf-8")


def test_seed_decides_the_story(generator: ModuleType, rng: np.random.Generator) -> None:
    for seed in map(int, rng.integers(0, 2**31, size=20)):
        assert generator.story(seed) == generator.story(seed)


def test_stories_vary(texts: list[str]) -> None:
    assert len(set(texts)) > 0.99 * N_STORIES
    assert len({text[:60] for text in texts}) > 0.5 * N_STORIES


def test_every_plot_and_every_line_can_be_told(generator: ModuleType, rng: np.random.Generator) -> None:
    from_seed = random.Random(int(rng.integers(2**31)))
    outline = sys.modules["stories.grammar"].outline
    for plot in generator.plots():
        text = " ".join(paragraph for _ in range(400) for paragraph in outline(plot, from_seed))
        for line in plot.lines:
            assert re.sub(r"^@\w\w ", "", line) in text, (plot.name, line)


def test_no_mark_is_left_over(texts: list[str]) -> None:
    for text in texts:
        assert not re.search(r"[{}\[\]|@_]", text), text


def test_spacing_and_quotes(texts: list[str]) -> None:
    for text in texts:
        assert "  " not in text
        assert not re.search(r" [.,!?]|\s$|^\s", text), text
        for paragraph in text.split("\n\n"):
            assert paragraph.count('"') % 2 == 0, paragraph
            assert paragraph[-1] in '.!?"', paragraph
            assert "\n" not in paragraph


def test_sentences_start_with_a_capital(texts: list[str]) -> None:
    for text in texts:
        assert text[0].isupper()
        assert not re.search(r"[.] [a-z]", text), text


def test_articles_agree(texts: list[str]) -> None:
    for text in texts:
        assert not re.search(r"\b[Aa] [aeio]", text.replace("a one", "")), text
        assert not re.search(r"\b[Aa]n [^aeiouAEIOU]", text), text


def test_no_verb_disagrees(texts: list[str]) -> None:
    for text in texts:
        assert not re.search(r"\b([Hh]e|[Ss]he|[Ii]t) were\b|\b([Tt]hey|[Ww]e) was\b|\bI are\b", text), text
        assert not re.search(r"\b(\w+) \1\b", text.replace("very very", "")), text


def test_village_is_consistent(generator: ModuleType) -> None:
    cast = sys.modules["stories.cast"]
    for mine, other in ((cast.GIRLS, cast.BOYS), (cast.BOYS, cast.GIRLS)):
        for one in mine.values():
            friend = other[one.friend]  # of the other gender
            assert (friend.friend, friend.is_animal) == (one.name, one.is_animal)
            assert friend.color != one.color
            assert one.elder in (("dad", "grandpa") if mine is cast.GIRLS else ("mom", "grandma"))


def test_hero_keeps_name_and_pronoun(generator: ModuleType, rng: np.random.Generator) -> None:
    """The hero is of one gender and all others are of the other, so that "he" and "she" say who is meant.

    With all of them given the hero's pronouns, the opposite one may appear nowhere.
    """
    opposite = {"she": r"\b(he|him|his|himself)\b", "he": r"\b(she|her|herself)\b"}
    grammar, cast = sys.modules["stories.grammar"], sys.modules["stories.cast"]
    # In these, the mother of a lost animal or a snowman is "she" or "he" by the plot's own words.
    others_take_part = ("the lost baby", "the snow day")
    for seed in map(int, rng.integers(0, 2**31, size=60)):
        words = cast.cast(random.Random(seed))
        is_girl = words["hero"] in cast.GIRLS
        assert (words["he"], words["him"], words["his"]) == (("she", "her", "her") if is_girl else ("he", "him", "his"))
        assert words["fhe"] == words["ehe"] == words["whe"] == ("he" if is_girl else "she")
        for prefix in "few":
            words |= cast.pronouns(is_girl, prefix)
        for plot in generator.plots():
            lines = " ".join(grammar.outline(plot, random.Random(seed)))
            told = grammar.expand(lines, words, generator.sentences(), random.Random(seed))
            if plot.name not in others_take_part:
                assert not re.search(opposite[words["he"]], told, re.IGNORECASE), (plot.name, told)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("a {color} hat", "an orange hat"),
        ("[A|A] [unicorn|unicorn] and a owl", "A unicorn and an owl"),
        ("{Hero} sat [|].", "Lily sat."),
        ("An hour, a house, a \"old\" one", 'An hour, a house, an "old" one'),
    ],
)  # fmt: skip
def test_templates(generator: ModuleType, template: str, text: str) -> None:
    grammar = sys.modules["stories.grammar"]
    words = {"color": "orange", "hero": "Lily"}
    assert grammar.tidy(grammar.expand(template, words, {}, random.Random(0))) == text


def test_unknown_key_is_an_error(generator: ModuleType) -> None:
    with pytest.raises(KeyError):
        sys.modules["stories.grammar"].expand("{nobody}", {}, {}, random.Random(0))


def test_labels_keep_a_story_consistent(generator: ModuleType) -> None:
    grammar = sys.modules["stories.grammar"]
    (section,) = grammar.parse("== x | any\n@a1 cat\n@a2 dog\n\nand\n\n@a1 meow\n@a2 woof\n")
    told = {tuple(grammar.outline(section, random.Random(seed))) for seed in range(50)}
    assert told == {("cat and meow",), ("dog and woof",)}
