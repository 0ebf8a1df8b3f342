"""The word lists of the story generator. Plain data; `cast.py` picks from it."""

from __future__ import annotations


def listed(words: str) -> tuple[str, ...]:
    """The words between the spaces."""
    return tuple(words.split())


GIRLS = listed(
    "Lily Mia Anna Lucy Emma Sara Ella Ruby Rosie Zoe Molly Daisy Nora Ivy Clara Amy Jane Kate Maya Nina "
    "Olive Penny Holly Tara Eva Alice Sally Poppy Hazel Grace Ada Betty Flora June Lena Wendy Fay Ines Kiki Uma"
)
BOYS = listed(
    "Tom Ben Max Sam Leo Tim Jack Finn Oscar Theo Noah Adam Luke Jake Henry Peter Toby Will Eli Owen "
    "Charlie Danny Felix George Hugo Ian Joe Kai Liam Milo Nico Otto Paul Rory Simon Vic Alfie Bobby Emil Ravi"
)
ANIMAL_GIRLS = listed("Pip Bella Dot Fern Ginger Honey Misty Nutmeg Pearl Tilly Willow Bean Clover Maple Plum Snowy")
ANIMAL_BOYS = listed(
    "Bruno Chip Dusty Fuzzy Pepper Rusty Scout Spike Teddy Ziggy Benny Biscuit Hopper Moss Oakley Waffle"
)

# Names outside the lists are put together from these, so that the model learns to copy a name it has never seen.
NAME_START = listed("B D F G J K L M N P R S T V Z Br Tr Dr Fl Kr Pl")
NAME_MIDDLE = listed("a e i o u")
NAME_LINK = listed("b d k l ll m n nn r rr t v z")
GIRL_END = listed("a ie y ina ella")
BOY_END = listed("o us en ick or")

GIRL_KINDS = ("little girl", "little girl", "little girl", "young girl", "small girl")
BOY_KINDS = ("little boy", "little boy", "little boy", "young boy", "small boy")
SPECIES = listed(
    "rabbit bear fox mouse squirrel hedgehog duck frog turtle owl badger beaver otter pig goat lamb elephant cat"
)

TRAITS = listed("kind happy brave clever curious cheerful gentle friendly playful lively")

# Small animals with a mother that looks for them.
LOST_ONES = ("kitten", "puppy", "duckling", "chick", "bunny", "baby owl", "baby deer", "lamb")

COLORS = listed("red blue green yellow orange purple pink white")
TOYS = listed("ball kite drum boat train truck robot top whistle puzzle")
KEEPSAKES = ("hat", "scarf", "teddy bear", "toy bunny", "ball", "blanket", "bag", "ring", "toy car", "doll")
FRUITS = {
    "apple": "apples",
    "pear": "pears",
    "plum": "plums",
    "peach": "peaches",
    "orange": "oranges",
    "berry": "berries",
}
TREATS = ("cookies", "muffins", "pancakes", "cupcakes", "buns", "biscuits", "tarts")
CAKES = ("apple pie", "chocolate cake", "carrot cake", "honey cake", "berry pie", "lemon cake")
SOUPS = ("carrot soup", "tomato soup", "pumpkin soup", "mushroom soup", "vegetable soup")
FLOWERS = ("roses", "daisies", "tulips", "sunflowers", "violets", "bluebells")
NUMBERS = ("two", "three", "four", "five", "six")
LOVES = (
    "to sing",
    "to dance",
    "to draw",
    "to read books",
    "to play outside",
    "to run fast",
    "to climb trees",
    "to look at the stars",
    "to help others",
    "to tell stories",
    "to pick flowers",
    "to jump in puddles",
    "to laugh",
    "to ask questions",
)

# Outdoor places: "in the park", "to the park", "the park", and spots there where a thing can lie or a creature can sit.
PLACES = (
    (
        "in the park",
        "to the park",
        "the park",
        ("under a bench", "behind a big tree", "near the fountain", "next to the swings"),
    ),
    (
        "in the garden",
        "to the garden",
        "the garden",
        ("under a rose bush", "behind the shed", "near the gate", "next to the fence"),
    ),
    (
        "in the forest",
        "to the forest",
        "the forest",
        ("under an old oak tree", "behind a log", "next to a mossy rock", "under a fern"),
    ),
    (
        "in the meadow",
        "to the meadow",
        "the meadow",
        ("in the tall grass", "behind a bush", "among the flowers", "next to a stone wall"),
    ),
    (
        "at the beach",
        "to the beach",
        "the beach",
        ("behind a rock", "next to a sandcastle", "under an old boat", "near a heap of shells"),
    ),
    (
        "on the farm",
        "to the farm",
        "the farm",
        ("behind the barn", "under a cart", "next to the haystack", "near the pond"),
    ),
    (
        "by the lake",
        "to the lake",
        "the lake",
        ("under a willow tree", "next to a log", "behind the reeds", "near the dock"),
    ),
    (
        "by the river",
        "to the river",
        "the river",
        ("under the bridge", "behind a bush", "next to a flat stone", "near the bank"),
    ),
    (
        "on the hill",
        "to the hill",
        "the hill",
        ("under a pine tree", "behind a rock", "in the tall grass", "next to the path"),
    ),
    (
        "in the orchard",
        "to the orchard",
        "the orchard",
        ("under an apple tree", "behind a ladder", "near a basket", "next to the wall"),
    ),
)
HOMES = (
    "in a small house by the sea",
    "in a cozy house near the forest",
    "in a little village",
    "in a house on a green hill",
    "in a quiet town",
    "in a small house at the end of the road",
    "near a big lake",
    "close to a big park",
    "on the edge of a forest",
    "in a little house with a blue door",
)
ANIMAL_HOMES = (
    "in a big green forest",
    "in a cozy den under a tree",
    "at the edge of a meadow",
    "near a little pond",
    "by a clear river",
    "on a sunny hill",
    "in a quiet valley",
    "in a little house in the woods",
    "next to an old oak tree",
)
GIRL_ELDERS = ("mom", "grandma")
BOY_ELDERS = ("dad", "grandpa")
WORKERS = (("Mr.", "he", "him", "his"), ("Mrs.", "she", "her", "her"))
SURNAMES = listed("Brown Hill Green Baker Wood Stone Bell Fields King Rose Martin Potter")
