"""The shapes world of the embedded model: coloured shapes on a plain background (`ground`), with captions.

A `Meaning` is the content of a caption; a `Scene` is a meaning with one phrasing and one arrangement of its things.
A scene depends only on its seed. Meanings are split by their hash: no evaluation caption, in any phrasing, occurs in
the training data or in the database.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ragturbo.errors import InvalidRequest

SIDE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "cross", "ring")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
GROUNDS = ("white", "gray", "black", "brown")
# Half extents in pixels. If a caption does not mention them, the size is medium and the ground white.
SIZES = {"small": 6.5, "medium": 9.0, "large": 12.5}
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
SPLITS = {"train": (0, 70), "database": (70, 88), "eval": (90, 100), "demo": (88, 90)}

# Two colours of every shape are rare: excluded from most training scenes, included in the database.
RARE = frozenset(
    (shape, COLOURS[(step * i + shift) % len(COLOURS)])
    for step, shift in ((1, 2), (3, 5))
    for i, shape in enumerate(SHAPES)
)

_COUNTS = {"a": 1, "an": 1, "one": 1, "two": 2, "three": 3}
_SIZE_WORDS = {"small": "small", "tiny": "small", "large": "large", "big": "large"}
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
_OPENINGS = ("", "", "", "an image of ", "a picture of ")
_GROUND_PHRASES = ("on a {} background", "on a {} ground", "with a {} background", "against a {} background")
JOINS = ("and", "with", "beside")


@dataclass(frozen=True, order=True)
class Noun:
    """`count` things of one kind; `size` is None if the caption does not mention it.

    `name` is a word that the caption uses in place of colour and shape (`names.py`).
    """

    shape: str
    colour: str
    size: str | None = None
    count: int = 1
    name: str | None = None

    @property
    def kind(self) -> tuple[str, str]:
        return self.shape, self.colour


@dataclass(frozen=True)
class Meaning:
    """The content of a caption. `relation` is of the first noun to the second; `ground` is None if not mentioned."""

    nouns: tuple[Noun, ...]
    relation: str | None = None
    ground: str | None = None

    @cached_property
    def canonical(self) -> str:
        """A string shared by all captions that describe the same picture."""
        nouns, relation = self.nouns, self.relation
        if len(nouns) == 2 and _spell(nouns[1]) < _spell(nouns[0]):
            nouns, relation = (nouns[1], nouns[0]), OPPOSITE.get(relation or "")
        return f"{' | '.join(map(_spell, nouns))} | {relation or ''} | {self.ground or 'white'}"

    @property
    def split(self) -> str:
        bucket = int.from_bytes(hashlib.blake2b(self.canonical.encode(), digest_size=8).digest(), "big") % 100
        return next(name for name, (low, high) in SPLITS.items() if low <= bucket < high)

    @property
    def kinds(self) -> frozenset[tuple[str, str]]:
        """The (shape, colour) pairs in the caption."""
        return frozenset(noun.kind for noun in self.nouns)

    @property
    def rare(self) -> bool:
        return not RARE.isdisjoint(self.kinds)


@dataclass(frozen=True)
class Thing:
    """One drawn object. The centre is in pixels (x to the right, y down), rounded to a quarter of a pixel."""

    shape: str
    colour: str
    size: str
    x: float
    y: float


@dataclass(frozen=True)
class Scene:
    meaning: Meaning
    caption: str
    things: tuple[Thing, ...]

    @property
    def ground(self) -> str:
        return self.meaning.ground or "white"


def sample_scene(
    seed: int, split: str = "train", *, rare: bool | None = None, kinds: tuple[tuple[str, str], ...] | None = None
) -> Scene:
    """Return the scene of a seed; `rare` requires or excludes rare kinds, `kinds` fixes its (shape, colour) pairs.

    Raises:
        InvalidRequest: no such scene was found; a small split lacks some kinds.
    """
    rng = np.random.default_rng([seed, list(SPLITS).index(split), 2 if rare is None else int(rare)])
    for _ in range(20_000):
        meaning = _sample_meaning(rng, kinds, rare)
        if meaning.split == split and (rare is None or meaning.rare == rare):
            return Scene(meaning, phrase(meaning, rng), arrange(meaning, rng))
    raise InvalidRequest(f"no scene of split {split!r} with kinds={kinds}, rare={rare} in 20,000 attempts")


def sample_scenes(count: int, seed: int, split: str, *, rare: bool | None = None) -> list[Scene]:
    """Return `count` scenes; scene i is `sample_scene(seed * 10**6 + i)`."""
    return [sample_scene(seed * 1_000_000 + i, split, rare=rare) for i in range(count)]


def all_kind_sets() -> list[tuple[tuple[str, str], ...]]:
    """Return every set of one or two kinds that a caption can name."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    return [(a,) for a in kinds] + [(a, b) for i, a in enumerate(kinds) for b in kinds[i + 1 :]]


def phrase(meaning: Meaning, rng: np.random.Generator) -> str:
    """Return one of the captions with this meaning."""
    nouns = list(meaning.nouns)
    relation = meaning.relation
    if len(nouns) == 2 and rng.random() < 0.5:
        nouns.reverse()
        relation = OPPOSITE[relation] if relation else None
    words = [_noun_phrase(noun, rng) for noun in nouns]
    if len(nouns) == 2:
        words.insert(1, str(rng.choice(_RELATION_PHRASES[relation] if relation else JOINS)))
    opening = str(rng.choice(_OPENINGS))
    if meaning.ground:
        words.append(str(rng.choice(_GROUND_PHRASES)).format(meaning.ground))
    return opening + " ".join(words)


def arrange(meaning: Meaning, rng: np.random.Generator) -> tuple[Thing, ...]:
    """Place the things apart from each other and from the border, so that the picture is unambiguous."""
    nouns = [noun for noun in meaning.nouns for _ in range(noun.count)]
    radii = [SIZES[noun.size or "medium"] for noun in nouns]
    while True:
        centres = np.round(_centres(len(nouns), meaning.relation, rng) * 4) / 4
        if _readable(centres, radii):
            break
    return tuple(
        Thing(noun.shape, noun.colour, noun.size or "medium", float(x), float(y))
        for noun, (x, y) in zip(nouns, centres, strict=True)
    )


def parse(caption: str, names: Mapping[str, tuple[str, str]] | None = None) -> Meaning:
    """Parse a caption of this world; raises InvalidRequest for any other text.

    names: the kind, (shape, colour), of each name that the caption may use.
    """
    names = names or {}
    text = " ".join(caption.lower().replace(",", " ").replace(".", " ").split())
    ground = re.search(rf"\b(?:on|with|against) an? ({'|'.join(GROUNDS)}) (?:background|ground)\b", text)
    if ground:
        text = text[: ground.start()] + text[ground.end() :]
    kinds = [rf"(?P<colour>{'|'.join(COLOURS)}) (?P<shape>{'|'.join(SHAPES)})"]
    if names:
        # Longest first: of two names where one begins with the other, the whole word is meant.
        kinds.append(rf"(?P<name>{'|'.join(sorted(map(re.escape, names), key=len, reverse=True))})")
    noun = re.compile(
        rf"\b(?P<count>{'|'.join(_COUNTS)}) (?:(?P<size>{'|'.join(_SIZE_WORDS)}) )?(?:{'|'.join(kinds)})(?:s|es)?\b"
    )
    found = list(noun.finditer(text))
    nouns = tuple(_noun(match.groupdict(), names) for match in found)
    if not 1 <= len(nouns) <= 2 or sum(n.count for n in nouns) > 3:
        raise InvalidRequest(
            f"{caption!r} is not a caption of the shapes world: expected one or two phrases such as "
            "'a small red circle' or 'two blue stars', with at most three things"
        )
    relation = None
    if len(found) == 2:
        between = text[found[0].end() : found[1].start()].strip()
        relation = next((name for name, phrases in _RELATION_PHRASES.items() if between in phrases), None)
    return Meaning(nouns, relation, ground[1] if ground else None)


def vocabulary() -> list[str]:
    """Return every word that a caption can contain, sorted."""
    words = {*_COUNTS, *_SIZE_WORDS, *COLOURS, *GROUNDS, *JOINS, *SHAPES, *map(plural, SHAPES)}
    for phrases in (_OPENINGS, _GROUND_PHRASES, *_RELATION_PHRASES.values()):
        words.update(word for text in phrases for word in text.split() if word != "{}")
    return sorted(words)


def _noun(found: dict[str, str | None], names: Mapping[str, tuple[str, str]]) -> Noun:
    name = found.get("name")
    shape, colour = names[name] if name else (str(found["shape"]), str(found["colour"]))
    return Noun(shape, colour, _SIZE_WORDS.get(found["size"] or ""), _COUNTS[str(found["count"])], name)


def _sample_meaning(rng: np.random.Generator, kinds: tuple[tuple[str, str], ...] | None, rare: bool | None) -> Meaning:
    names = int(rng.random() < 0.65) + 1 if kinds is None else len(kinds)
    chosen: list[tuple[str, str]] = []
    while len(chosen) < names:
        kind = (SHAPES[rng.integers(len(SHAPES))], COLOURS[rng.integers(len(COLOURS))])
        if kinds is not None:
            kind = kinds[len(chosen)]
        elif kind in chosen or (rare is False and kind in RARE):
            continue
        chosen.append(kind)
    counts, relation = [1] * names, None
    draw = rng.random()
    if names == 1:
        counts = [1] if draw < 0.43 else [2] if draw < 0.73 else [3]
    elif draw < 0.7:
        relation = list(RELATIONS)[rng.integers(len(RELATIONS))]
    elif draw < 0.87:
        counts[rng.integers(2)] = 2
    sizes = [(None, None, "small", "large")[rng.integers(4)] for _ in chosen]
    ground = None if rng.random() < 0.25 else GROUNDS[rng.integers(len(GROUNDS))]
    nouns = tuple(Noun(*kind, size, count) for kind, size, count in zip(chosen, sizes, counts, strict=True))
    return Meaning(nouns, relation, ground)


def _centres(count: int, relation: str | None, rng: np.random.Generator) -> np.ndarray:
    middle = SIDE / 2
    if count == 1:
        return middle + rng.uniform(-10, 10, (1, 2))
    if count == 2:
        way = np.array(RELATIONS[relation or list(RELATIONS)[rng.integers(4)]])
        apart, across = way * rng.uniform(13, 17), way[::-1] * rng.uniform(-9, 9)
        return middle + np.stack([apart, -apart]) + across + rng.uniform(-2, 2, (2, 2))
    cells = np.array([(-1, -1), (1, -1), (-1, 1), (1, 1)])[rng.permutation(4)[:count]]
    return middle + 15 * cells + rng.uniform(-3, 3, (count, 2))


def _readable(centres: np.ndarray, radii: list[float]) -> bool:
    reach = np.array(radii)[:, None]
    if (centres - reach < 2.5).any() or (centres + reach > SIDE - 2.5).any():
        return False
    pairs = [(i, j) for i in range(len(radii)) for j in range(i)]
    return all(np.abs(centres[i] - centres[j]).max() >= radii[i] + radii[j] + 3 for i, j in pairs)


def _noun_phrase(noun: Noun, rng: np.random.Generator) -> str:
    size = [str(rng.choice([word for word, size in _SIZE_WORDS.items() if size == noun.size]))] if noun.size else []
    *adjectives, word = [noun.name] if noun.name else [noun.colour, noun.shape]
    words = [*size, *adjectives, word if noun.count == 1 else plural(word)]
    if noun.count > 1:
        return " ".join([("two", "three")[noun.count - 2], *words])
    return " ".join(["an" if words[0][0] in "aeiou" else "a", *words])


def plural(word: str) -> str:
    return word + ("es" if word.endswith("s") else "s")


def _spell(noun: Noun) -> str:
    return f"{noun.count} {noun.size or 'medium'} {noun.colour} {noun.shape}"
