"""Simple stories for children, made from templates: the training data of the demo model.

``story(seed)`` is the whole interface. The same seed always gives the same story. Standard library only.
"""

from __future__ import annotations

import functools
import random
from pathlib import Path

from .cast import cast
from .grammar import Section, expand, load, outline, tidy

__all__ = ["plots", "sketch", "story"]

PLOTS = Path(__file__).with_name("plots")
SHARED = "shared.txt"
THE_END = 0.2


@functools.cache
def plots() -> tuple[Section, ...]:
    """All plots, from the files in plots/."""
    files = sorted(path for path in PLOTS.glob("*.txt") if path.name != SHARED)
    return tuple(section for path in files for section in load(path))


@functools.cache
def sentences() -> dict[str, list[str]]:
    """The sets of sentences that all plots share, by name."""
    return {section.name: section.lines for section in load(PLOTS / SHARED)}


def story(seed: int) -> str:
    """One story of three or four paragraphs, about 100 to 250 words; `seed` decides everything in it.

    A plot's flag `child` or `animal` says who its hero must be.
    """
    rng = random.Random(seed)
    plot = rng.choice(plots())
    words = cast(rng, "animal" in plot.flags if plot.flags & {"child", "animal"} else None)
    paragraphs = outline(plot, rng)
    if rng.random() < THE_END:
        paragraphs[-1] += " {THE_END}"
    return "\n\n".join(tidy(expand(paragraph, words, sentences(), rng)) for paragraph in paragraphs)


def sketch(seed: int) -> str:
    """A few sentences about one or two characters, without a plot."""
    rng = random.Random(seed)
    words = cast(rng)
    return tidy(expand(rng.choice(sentences()["SKETCH"]), words, sentences(), rng))
