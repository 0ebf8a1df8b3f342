"""Templates and how they become text.

A template is ordinary English with two kinds of marks:

- ``[one|two|three]`` is one of the alternatives, chosen anew each time; alternatives may be empty and may nest;
- ``{key}`` is a word or a template that the story knows under this name. Written with a capital, ``{Key}``, the result
  starts with a capital. A key in capitals, ``{SAD}``, is the name of a set of whole sentences.

Sets of templates are kept in text files: ``== name | flag flag`` starts a set, a line ``-`` starts a paragraph, an
empty line ends a step, and each other line is one alternative of its step. Lines that start with ``#`` are comments. A
line may start with a label such as ``@a1``: once a story has taken a line with ``@a1``, lines with ``@a2``, ``@a3``, …
are out for the rest of it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

CHOICE = re.compile(r"\[([^\[\]]*)\]")
KEY = re.compile(r"\{([A-Za-z_]+)\}")
LABEL = re.compile(r"@([a-z])([0-9]) ")
ARTICLE = re.compile(r"\b([Aa]) (?=\"?([A-Za-z]+))")
# Words that are written with a vowel but not spoken with one, or the other way round.
SPOKEN_CONSONANT = ("one", "once", "uni", "use")
SPOKEN_VOWEL = ("hour", "honest")


@dataclass
class Section:
    """One set of templates: `paragraphs[p][s]` are the alternatives of step s of paragraph p."""

    name: str
    flags: frozenset[str]
    paragraphs: list[list[list[str]]] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        """Every template of the section."""
        return [line for paragraph in self.paragraphs for step in paragraph for line in step]


def parse(text: str, origin: str = "text") -> list[Section]:
    """Read the sections of a template file; raises ValueError naming the line that is wrong."""
    sections: list[Section] = []
    new_step = True
    for number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if line.startswith("#"):
            continue
        if line.startswith("== "):
            name, _, flags = line[3:].partition("|")
            sections.append(Section(name.strip(), frozenset(flags.split()), [[]]))
            new_step = True
        elif not line:
            new_step = True
        elif not sections:
            raise ValueError(f"{origin}:{number}: text before the first '== name' line")
        elif line == "-":
            sections[-1].paragraphs.append([])
            new_step = True
        else:
            if line.count("[") != line.count("]") or line.count("{") != line.count("}"):
                raise ValueError(f"{origin}:{number}: unbalanced brackets")
            if new_step:
                sections[-1].paragraphs[-1].append([])
                new_step = False
            sections[-1].paragraphs[-1][-1].append(line)
    return sections


def load(path: Path) -> list[Section]:
    """Read a template file."""
    return parse(path.read_text(encoding="utf-8"), path.name)


def capitalized(text: str) -> str:
    """The text with its first letter in upper case, the rest untouched."""
    return text[:1].upper() + text[1:]


def outline(section: Section, rng: random.Random) -> list[str]:
    """Choose one alternative of each step, true to the labels; the paragraphs, still as templates."""
    taken: dict[str, str] = {}

    def fits(line: str) -> bool:
        label = LABEL.match(line)
        return label is None or taken.get(label[1], label[2]) == label[2]

    def choose(step: list[str]) -> str:
        line = rng.choice([line for line in step if fits(line)])
        if label := LABEL.match(line):
            taken[label[1]] = label[2]
            line = line[label.end() :]
        return line

    return [" ".join(choose(step) for step in paragraph) for paragraph in section.paragraphs]


def expand(template: str, words: Mapping[str, str], sentences: Mapping[str, list[str]], rng: random.Random) -> str:
    """Resolve all marks of a template; raises KeyError for a key that nobody defines."""

    def value(match: re.Match[str]) -> str:
        key = match.group(1)
        if key in sentences:
            return expand(rng.choice(sentences[key]), words, sentences, rng)
        text = expand(words[key[:1].lower() + key[1:]], words, sentences, rng)
        return capitalized(text) if key[0].isupper() else text

    while CHOICE.search(template):
        template = CHOICE.sub(lambda match: rng.choice(match.group(1).split("|")), template)
    return KEY.sub(value, template)


def with_articles(text: str) -> str:
    """Write "an" for "a" before a vowel sound."""

    def article(match: re.Match[str]) -> str:
        word = match.group(2).lower()
        vowel = (word[0] in "aeiou" and not word.startswith(SPOKEN_CONSONANT)) or word.startswith(SPOKEN_VOWEL)
        return match.group(1) + ("n " if vowel else " ")

    return ARTICLE.sub(article, text)


def tidy(text: str) -> str:
    """Close the gaps that empty alternatives leave, and put the articles right."""
    text = re.sub(r" +", " ", text).strip()
    text = re.sub(r" ([.,!?])", r"\1", text)
    return with_articles(text)
