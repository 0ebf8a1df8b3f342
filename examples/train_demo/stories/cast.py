"""Who and what a story is about: every word that must stay the same from its first sentence to its last."""

from __future__ import annotations

import random
from dataclasses import dataclass

from . import words


@dataclass(frozen=True)
class Character:
    """Someone of the village, and what is always the same about them: a small model can learn that by heart."""

    name: str
    species: str
    friend: str
    elder: str
    color: str
    toy: str
    keepsake: str
    treats: str
    fruit: str
    place: str

    @property
    def is_animal(self) -> bool:
        return self.species not in ("girl", "boy")

    @property
    def hand(self) -> str:
        """What this one holds things with."""
        return "paw" if self.is_animal else "hand"


GIRLS, BOYS = ({row[0]: Character(*row) for row in rows} for rows in (words.GIRLS, words.BOYS))
EVERYONE = GIRLS | BOYS


def pronouns(female: bool, prefix: str = "") -> dict[str, str]:
    """The pronouns as template keys: he, him, his, himself."""
    forms = ("she", "her", "her", "herself") if female else ("he", "him", "his", "himself")
    return {prefix + key: form for key, form in zip(("he", "him", "his", "himself"), forms, strict=True)}


def cast(rng: random.Random, animal: bool | None = None) -> dict[str, str]:
    """Choose a hero, an animal or a child or (None) any, and with it everything of one story, as template keys."""
    hero = rng.choice([one for one in EVERYONE.values() if animal is None or one.is_animal == animal])
    friend = EVERYONE[hero.friend]
    is_girl = hero.name in GIRLS
    in_place, spots = words.PLACES[hero.place]
    trait, trait_b = rng.sample(words.TRAITS, 2)
    return {
        "hero": hero.name,
        "kind": f"little {hero.species}",
        "hand": hero.hand,
        "fhand": friend.hand,
        "trait": trait,
        "trait_b": trait_b,
        "loves": rng.choice(words.LOVES),
        "home": rng.choice(words.ANIMAL_HOMES if hero.is_animal else words.HOMES),
        **pronouns(is_girl),
        "friend": friend.name,
        "fkind": f"little {friend.species}",
        **pronouns(not is_girl, "f"),
        "elder": hero.elder,
        **pronouns(not is_girl, "e"),
        "worker": words.MR if is_girl else words.MRS,
        **pronouns(not is_girl, "w"),
        "in_place": in_place,
        "to_place": f"to the {hero.place}",
        "place": f"the {hero.place}",
        "spot": rng.choice(spots),
        "lost_one": rng.choice(words.LOST_ONES),
        "color": hero.color,
        "color_b": friend.color,
        "toy": hero.toy,
        "keepsake": hero.keepsake,
        "fruit": hero.fruit,
        "fruits": words.FRUITS[hero.fruit],
        "treats": hero.treats,
        "cake": f"{hero.fruit} cake",
        "soup": rng.choice(words.SOUPS),
        "flowers": rng.choice(words.FLOWERS),
        "number": rng.choice(words.NUMBERS),
    }
