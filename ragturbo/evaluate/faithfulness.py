"""Does a picture show what its caption says? TIFA's way, but exact: the world is closed, so questions follow from the
caption by grammar and answers from the pixels by geometry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from PIL import Image

from .seeing import Picture, Seen, look
from .world import RELATIONS, Meaning, Noun, Scene, parse

CATEGORIES = ("object", "colour", "counting", "spatial", "size", "background")


@dataclass(frozen=True)
class Question:
    """`nouns`: what it is about, one noun, or two where it asks for a relation; none for the picture as a whole."""

    category: str
    text: str
    expected: str
    nouns: tuple[Noun, ...] = ()
    relation: str | None = None


@dataclass(frozen=True)
class Rate:
    """A mean over `count` captions or questions, with the half width of its 95 % interval."""

    mean: float
    interval: float
    count: int

    @staticmethod
    def of(values: Sequence[float]) -> Rate:
        if not values:
            return Rate(float("nan"), float("nan"), 0)
        return Rate(float(np.mean(values)), float(1.96 * np.std(values) / np.sqrt(len(values))), len(values))


@dataclass(frozen=True)
class Report:
    """`overall` is TIFA's score, the mean over captions of the share of right answers; `exact` counts only captions
    with every answer right. `common` and `rare` are `overall` for captions without and with a rare kind."""

    overall: Rate
    exact: Rate
    common: Rate
    rare: Rate
    categories: dict[str, Rate]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def questions(meaning: Meaning) -> list[Question]:
    """What the caption commits a picture to."""
    asked = []
    for shape in dict.fromkeys(noun.shape for noun in meaning.nouns):
        asked.append(Question("object", f"is there a {shape}?", "yes", (Noun(shape, ""),)))
    for noun in meaning.nouns:
        kind = Noun(noun.shape, noun.colour)
        asked.append(Question("colour", f"is there a {kind.colour} {kind.shape}?", "yes", (kind,)))
        if noun.size:
            asked.append(Question("size", f"is there a {noun.size} {kind.colour} {kind.shape}?", "yes", (noun,)))
        if noun.count > 1:
            text = f"how many {kind.colour} {kind.shape}s are there?"
            asked.append(Question("counting", text, str(noun.count), (kind,)))
    total = sum(noun.count for noun in meaning.nouns)
    asked.append(Question("counting", "how many things are there?", str(total)))
    if meaning.relation:
        one, other = (Noun(noun.shape, noun.colour) for noun in meaning.nouns)
        text = f"is the {one.colour} {one.shape} {meaning.relation} the {other.colour} {other.shape}?"
        asked.append(Question("spatial", text, "yes", (one, other), meaning.relation))
    if meaning.ground:
        asked.append(Question("background", "what colour is the background?", meaning.ground))
    return asked


def answer(question: Question, picture: Picture) -> str:
    """The picture's answer to a question."""
    if question.category == "background":
        return picture.ground or "none of the world's"
    if question.relation:
        pairs = ((a, b) for a in picture.things for b in picture.things if a is not b)
        one, other = question.nouns
        return _yes(_is(a, one) and _is(b, other) and relation_of(a, b) == question.relation for a, b in pairs)
    if question.category == "counting":
        counted = [t for t in picture.things if not question.nouns or _is(t, question.nouns[0])]
        return str(len(counted))
    return _yes(_is(thing, question.nouns[0]) for thing in picture.things)


def relation_of(a: Seen, b: Seen) -> str:
    """Where a lies, seen from b: the larger of the two distances decides."""
    dx, dy = a.x - b.x, a.y - b.y
    way = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    return next((name for name, direction in RELATIONS.items() if direction == way), "on")


def answers(caption: str | Meaning, image: np.ndarray | Image.Image | Picture) -> list[tuple[Question, str]]:
    """Every question of the caption with the image's answer."""
    meaning = parse(caption) if isinstance(caption, str) else caption
    picture = image if isinstance(image, Picture) else look(np.asarray(image))
    return [(question, answer(question, picture)) for question in questions(meaning)]


def faithfulness(captions: Iterable[str | Meaning], images: Iterable[np.ndarray | Image.Image | Picture]) -> Report:
    """Scores image i against caption i."""
    overall, exact = [], []
    apart: dict[bool, list[float]] = {True: [], False: []}
    categories: dict[str, list[float]] = defaultdict(list)
    for caption, image in zip(captions, images, strict=True):
        meaning = parse(caption) if isinstance(caption, str) else caption
        right = []
        for question, given in answers(meaning, image):
            right.append(float(given == question.expected))
            categories[question.category].append(right[-1])
        overall.append(sum(right) / len(right))
        exact.append(float(all(right)))
        apart[meaning.rare].append(overall[-1])
    return Report(
        Rate.of(overall), Rate.of(exact), Rate.of(apart[False]), Rate.of(apart[True]),
        {name: Rate.of(categories[name]) for name in CATEGORIES},
    )  # fmt: skip


def truth(scene: Scene) -> Picture:
    """The picture a perfect eye would see: the scene's own arrangement, without pixels."""
    return Picture(scene.ground, tuple(Seen(t.shape, t.colour, t.size, t.x, t.y, 1.0) for t in scene.things))


def _is(thing: Seen, noun: Noun) -> bool:
    return (
        thing.shape == noun.shape
        and (not noun.colour or thing.colour == noun.colour)
        and (noun.size is None or thing.size == noun.size)
    )


def _yes(found: Iterable[bool]) -> str:
    return "yes" if any(found) else "no"
