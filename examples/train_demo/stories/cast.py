"""Who and what a story is about: every word that must stay the same from its first sentence to its last."""

from __future__ import annotations

import random
from collections.abc import Set
from dataclasses import dataclass

from . import words

PRONOUNS = {"girl": ("she", "her", "her", "herself"), "boy": ("he", "him", "his", "himself")}
INVENTED_NAMES = 0.15


@dataclass(frozen=True)
class Character:
    """A child or an animal with a name; `kind` is what it is called before its name is known."""

    name: str
    gender: str
    kind: str

    def words(self, prefix: str = "") -> dict[str, str]:
        """The pronouns as template keys: he, him, his, himself."""
        return {
            prefix + key: word for key, word in zip(("he", "him", "his", "himself"), PRONOUNS[self.gender], strict=True)
        }


def invented_name(gender: str, rng: random.Random) -> str:
    """A name that can be spoken and is in no list."""
    end = rng.choice(words.GIRL_END if gender == "girl" else words.BOY_END)
    return rng.choice(words.NAME_START) + rng.choice(words.NAME_MIDDLE) + rng.choice(words.NAME_LINK) + end


def character(animal: bool, rng: random.Random, banned: Set[str], other: Character | None = None) -> Character:
    """A new character, of none of the banned species and with another name than the other one."""
    gender = rng.choice(("girl", "boy"))
    if animal:
        names = words.ANIMAL_GIRLS if gender == "girl" else words.ANIMAL_BOYS
        if rng.random() < 0.3:
            names = words.GIRLS if gender == "girl" else words.BOYS
        kind = rng.choice([species for species in words.SPECIES if species not in banned])
        kind = rng.choice(("", "little ", "little ", "small ", "young ")) + kind
    else:
        names = words.GIRLS if gender == "girl" else words.BOYS
        kind = rng.choice(words.GIRL_KINDS if gender == "girl" else words.BOY_KINDS)
    name = invented_name(gender, rng) if rng.random() < INVENTED_NAMES else rng.choice(names)
    if other is not None and name == other.name:
        return character(animal, rng, banned, other)
    return Character(name, gender, kind)


def hand(person: Character) -> str:
    """What this one holds things with."""
    species = person.kind.split()[-1]
    if species in ("owl", "duck"):
        return "wing"
    return "paw" if species in words.SPECIES and species not in ("frog", "turtle") else "hand"


def cast(animal: bool, rng: random.Random, banned: Set[str] = frozenset()) -> dict[str, str]:
    """Choose everyone and everything of one story, as template keys; no animal of a banned species takes part."""
    hero = character(animal, rng, banned)
    friend = character(animal, rng, banned | {hero.kind.split()[-1]}, hero)
    elder_gender = rng.choice(("girl", "boy"))
    elder = rng.choice(words.GIRL_ELDERS if elder_gender == "girl" else words.BOY_ELDERS)
    title, *worker = rng.choice(words.WORKERS)
    in_place, to_place, place, spots = rng.choice(words.PLACES)
    fruit = rng.choice(sorted(words.FRUITS))
    taken = {person.kind.split()[-1] for person in (hero, friend)}
    color, color2 = rng.sample(words.COLORS, 2)
    trait, trait_b = rng.sample(words.TRAITS, 2)
    return {
        "hero": hero.name,
        "kind": hero.kind,
        "hand": hand(hero),
        "fhand": hand(friend),
        "trait": trait,
        "trait_b": trait_b,
        "loves": rng.choice(words.LOVES),
        "home": rng.choice(words.ANIMAL_HOMES if animal else words.HOMES),
        **hero.words(),
        "friend": friend.name,
        "fkind": friend.kind,
        **friend.words("f"),
        "elder": elder,
        **Character(elder, elder_gender, elder).words("e"),
        "worker": f"{title} {rng.choice(words.SURNAMES)}",
        **dict(zip(("whe", "whim", "whis"), worker, strict=True)),
        "in_place": in_place,
        "to_place": to_place,
        "place": place,
        "spot": rng.choice(spots),
        "lost_one": rng.choice(
            [name for name in words.LOST_ONES if name not in taken and name.removeprefix("baby ") not in taken]
        ),
        "color": color,
        "color_b": color2,
        "toy": rng.choice(words.TOYS),
        "keepsake": rng.choice(words.KEEPSAKES),
        "fruit": fruit,
        "fruits": words.FRUITS[fruit],
        "treats": rng.choice(words.TREATS),
        "cake": rng.choice(words.CAKES),
        "soup": rng.choice(words.SOUPS),
        "flowers": rng.choice(words.FLOWERS),
        "number": rng.choice(words.NUMBERS),
    }
