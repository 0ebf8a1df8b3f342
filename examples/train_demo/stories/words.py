"""The word lists of the story generator. Plain data; `cast.py` picks from it."""

from __future__ import annotations


def listed(words: str) -> tuple[str, ...]:
    """The words between the spaces."""
    return tuple(words.split())


# Everyone there is, with what is always the same about them: name, kind, best friend, the one grown-up at home, color,
# toy, favorite thing, treats, fruit, and favorite place. A girl's friend, grown-up and neighbor are male and a boy's
# are female, so that "he" and "she" always say who is meant.
GIRLS = (
    ("Lily", "girl", "Tom", "dad", "red", "ball", "scarf", "cookies", "apple", "park"),
    ("Mia", "girl", "Ben", "dad", "yellow", "kite", "hat", "muffins", "pear", "garden"),
    ("Emma", "girl", "Sam", "dad", "blue", "drum", "teddy bear", "pancakes", "plum", "beach"),
    ("Ruby", "girl", "Jack", "dad", "pink", "top", "blanket", "cupcakes", "berry", "meadow"),
    ("Nora", "girl", "Finn", "dad", "green", "boat", "bag", "buns", "peach", "lake"),
    ("Zoe", "girl", "Henry", "dad", "purple", "train", "ring", "tarts", "orange", "hill"),
    ("Kate", "girl", "Oscar", "dad", "white", "robot", "doll", "biscuits", "apple", "farm"),
    ("Daisy", "girl", "Paul", "dad", "orange", "whistle", "toy bunny", "cookies", "berry", "orchard"),
    ("Willow", "squirrel", "Hopper", "dad", "red", "ball", "hat", "muffins", "plum", "forest"),
    ("Clover", "mouse", "Waffle", "dad", "blue", "drum", "blanket", "biscuits", "berry", "garden"),
    ("Ginger", "cat", "Alfie", "dad", "white", "boat", "scarf", "pancakes", "pear", "river"),
    ("Ivy", "fox", "Vic", "dad", "green", "kite", "bag", "tarts", "apple", "meadow"),
)
BOYS = (
    ("Tom", "boy", "Lily", "mom", "blue", "truck", "hat", "pancakes", "pear", "park"),
    ("Ben", "boy", "Mia", "mom", "red", "boat", "toy car", "cookies", "apple", "river"),
    ("Sam", "boy", "Emma", "mom", "green", "robot", "blanket", "muffins", "orange", "beach"),
    ("Jack", "boy", "Ruby", "mom", "orange", "kite", "bag", "biscuits", "peach", "hill"),
    ("Finn", "boy", "Nora", "mom", "yellow", "train", "scarf", "tarts", "plum", "lake"),
    ("Henry", "boy", "Zoe", "mom", "white", "puzzle", "teddy bear", "buns", "berry", "forest"),
    ("Oscar", "boy", "Kate", "mom", "purple", "ball", "ring", "cupcakes", "apple", "farm"),
    ("Paul", "boy", "Daisy", "mom", "pink", "drum", "hat", "cookies", "plum", "garden"),
    ("Hopper", "rabbit", "Willow", "mom", "yellow", "whistle", "scarf", "buns", "apple", "meadow"),
    ("Waffle", "bear", "Clover", "mom", "purple", "truck", "blanket", "pancakes", "berry", "forest"),
    ("Alfie", "badger", "Ginger", "mom", "orange", "top", "bag", "cookies", "pear", "hill"),
    ("Vic", "hedgehog", "Ivy", "mom", "red", "train", "hat", "cupcakes", "plum", "orchard"),
)

TRAITS = listed("kind happy brave clever curious cheerful gentle friendly playful lively")

# Small animals with a mother that looks for them.
LOST_ONES = ("puppy", "duckling", "chick", "lamb")

FRUITS = {
    "apple": "apples",
    "pear": "pears",
    "plum": "plums",
    "peach": "peaches",
    "orange": "oranges",
    "berry": "berries",
}
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

# Outdoor places: "in the park", and spots there where a thing can lie or a creature can sit.
PLACES = {
    "park": ("in the park", ("under a bench", "behind a big tree", "near the fountain", "next to the swings")),
    "garden": ("in the garden", ("under a rose bush", "behind the shed", "near the gate", "next to the fence")),
    "forest": ("in the forest", ("under an old oak tree", "behind a log", "next to a mossy rock", "under a fern")),
    "meadow": ("in the meadow", ("in the tall grass", "behind a bush", "among the flowers", "next to a stone wall")),
    "beach": ("at the beach", ("behind a rock", "next to a sandcastle", "under an old boat", "near a heap of shells")),
    "farm": ("on the farm", ("behind the barn", "under a cart", "next to the haystack", "near the pond")),
    "lake": ("by the lake", ("under a willow tree", "next to a log", "behind the reeds", "near the dock")),
    "river": ("by the river", ("under the bridge", "behind a bush", "next to a flat stone", "near the bank")),
    "hill": ("on the hill", ("under a pine tree", "behind a rock", "in the tall grass", "next to the path")),
    "orchard": ("in the orchard", ("under an apple tree", "behind a ladder", "near a basket", "next to the wall")),
}
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
# The neighbor that the boys meet, and the one that the girls meet.
MRS, MR = "Mrs. Brown", "Mr. Hill"
