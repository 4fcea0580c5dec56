"""Names in the shapes world: made-up words for kinds, which only a database can explain.

A name stands for a colour and a shape: if "zib" names the red star, "two zibs left of a blue square" shows two red
stars. No model is trained on a name of the evaluation, so it can draw the thing only from a retrieved picture with a
caption that has the name (a lesson). Names are split by their hash, as meanings are.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ragturbo.evaluate.world import (
    COLOURS,
    SHAPES,
    Meaning,
    Noun,
    Scene,
    arrange,
    phrase,
    plural,
    sample_scene,
    vocabulary,
)

Kind = tuple[str, str]

NAME_SPLITS = {"train": (0, 60), "eval": (60, 95), "demo": (95, 100)}
# One kind of every shape and of every colour, none of them rare, that no name of the training data stands for.
UNNAMED: frozenset[Kind] = frozenset((shape, COLOURS[5 * i % len(COLOURS)]) for i, shape in enumerate(SHAPES))

_CONSONANTS = "bcdfghjklmnpqrstvwxyz"
_VOWELS = "aeiou"
_PATTERNS = ("cvc", "cvcv", "cvcvc", "cvcvc", "vcvc", "cvccv", "cvcvcv")


def made_up_word(rng: np.random.Generator, split: str) -> str:
    """Return a pronounceable word that no caption contains otherwise; names of different splits are different."""
    known = vocabulary()
    low, high = NAME_SPLITS[split]
    while True:
        pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
        letters = [_CONSONANTS if place == "c" else _VOWELS for place in pattern]
        word = "".join(choices[rng.integers(len(choices))] for choices in letters)
        bucket = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big") % 100
        # A word in -s could be mistaken for a plural.
        if low <= bucket < high and not word.endswith("s") and word not in known:
            return word


def name_nouns(meaning: Meaning, which: tuple[int, ...], names: tuple[str, ...]) -> Meaning:
    """Return the meaning with names in place of the colour and shape of some nouns, given by position."""
    nouns = list(meaning.nouns)
    for i, name in zip(which, names, strict=True):
        nouns[i] = replace(nouns[i], name=name)
    return replace(meaning, nouns=tuple(nouns))


def sample_named_scene(seed: int, split: str = "eval", *, names: int = 1, taught: bool | None = True) -> Scene:
    """Return a scene whose caption uses made-up names.

    Args:
        seed, split: as in `sample_scene`. The names are of the split, too.
        names: 1: one noun of one or two is named; 2: both nouns of two.
        taught: whether names stand for kinds that have names in the training data; False: for UNNAMED; None: for any.
    """
    rng = np.random.default_rng([seed, 7, names])
    for attempt in range(10_000):
        meaning = sample_scene(int(rng.integers(2**31)) + attempt, split).meaning
        nouns = meaning.nouns
        if names > len(nouns):
            continue
        which = tuple(sorted(rng.permutation(len(nouns))[:names].tolist()))
        if taught is not None and any((nouns[i].kind in UNNAMED) == taught for i in which):
            continue
        words: list[str] = []
        while len(words) < names:
            word = made_up_word(rng, split)
            if word not in words:
                words.append(word)
        meaning = name_nouns(meaning, which, tuple(words))
        return Scene(meaning, phrase(meaning, rng), arrange(meaning, rng))
    raise RuntimeError("no scene found")


def lesson(noun: Noun, seed: int, split: str = "database") -> Scene:
    """Return a picture of what a noun's name stands for, alone, with a caption that only names it: "two large zibs"."""
    rng = np.random.default_rng([seed, 8])
    meaning = sample_scene(int(rng.integers(2**31)), split, kinds=(noun.kind,)).meaning
    meaning = name_nouns(meaning, (0,), (str(noun.name),))
    return Scene(meaning, phrase(meaning, rng), arrange(meaning, rng))


def named(meaning: Meaning) -> tuple[Noun, ...]:
    return tuple(noun for noun in meaning.nouns if noun.name)


def describe_names(caption: str, nouns: Sequence[Noun]) -> str:
    """Return the caption with colour and shape in place of the names of these nouns."""
    for noun in nouns:
        shape = noun.shape if noun.count == 1 else plural(noun.shape)
        caption = re.sub(rf"\b{re.escape(str(noun.name))}(e?s)?\b", f"{noun.colour} {shape}", caption)
    caption = re.sub(r"\ban (?=[^aeiou\s])", "a ", caption)
    return re.sub(r"\ba (?=orange\b)", "an ", caption)
