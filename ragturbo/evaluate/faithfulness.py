"""Exact faithfulness on the shapes world: TIFA with questions from the grammar and answers from the pixels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ragturbo.evaluate.recognition import RecognisedPicture, RecognisedThing, recognise
from ragturbo.evaluate.scores import CategoryCounts, ImageScore, right_share
from ragturbo.evaluate.suites import Prompt
from ragturbo.evaluate.world import RELATIONS, Meaning, Noun, parse

CATEGORIES = ("object", "colour", "counting", "spatial", "size", "background")


@dataclass(frozen=True)
class Question:
    """A question about the picture as a whole, about a thing, or about the relation of two things."""

    category: str
    expected: str
    nouns: tuple[Noun, ...] = ()
    relation: str | None = None


class Faithfulness:
    """The metric of the shapes suite: the share of right answers per image."""

    name = "faithfulness"
    about = "exact, by segmentation and shape matching; no learned model"

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[ImageScore]:
        return [self.score_image(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def score_image(self, prompt: Prompt, image: Image.Image) -> ImageScore:
        counts = count_answers(parse(prompt.text), recognise(np.asarray(image)))
        return ImageScore(prompt.id, right_share(counts), counts)


def count_answers(meaning: Meaning, picture: RecognisedPicture) -> CategoryCounts:
    """Return (right answers, questions) per category."""
    counts: CategoryCounts = {}
    for question in questions(meaning):
        right, asked = counts.get(question.category, (0, 0))
        counts[question.category] = (right + (answer(question, picture) == question.expected), asked + 1)
    return counts


def questions(meaning: Meaning) -> list[Question]:
    """Return every question whose answer the caption determines."""
    kinds = [Noun(noun.shape, noun.colour) for noun in meaning.nouns]
    shapes = dict.fromkeys(noun.shape for noun in meaning.nouns)
    asked = [Question("object", "yes", (Noun(shape, ""),)) for shape in shapes]
    for noun, kind in zip(meaning.nouns, kinds, strict=True):
        asked.append(Question("colour", "yes", (kind,)))
        if noun.size:
            asked.append(Question("size", "yes", (noun,)))
        if noun.count > 1:
            asked.append(Question("counting", str(noun.count), (kind,)))
    asked.append(Question("counting", str(sum(noun.count for noun in meaning.nouns))))
    if meaning.relation:
        asked.append(Question("spatial", "yes", tuple(kinds), meaning.relation))
    if meaning.ground:
        asked.append(Question("background", meaning.ground))
    return asked


def answer(question: Question, picture: RecognisedPicture) -> str:
    """Answer a question from what was recognised in the picture."""
    if question.category == "background":
        return picture.ground or "unknown"
    if question.relation:
        one, other = ([t for t in picture.things if _matches(t, noun)] for noun in question.nouns)
        count = sum(a is not b and _relation(a, b) == question.relation for a in one for b in other)
    else:
        count = sum(not question.nouns or _matches(thing, question.nouns[0]) for thing in picture.things)
    return str(count) if question.category == "counting" else "yes" if count else "no"


def _relation(a: RecognisedThing, b: RecognisedThing) -> str:
    """Return the position of a relative to b, along the axis with the larger distance."""
    dx, dy = a.x - b.x, a.y - b.y
    way = (int(np.sign(dx)), 0) if abs(dx) > abs(dy) else (0, int(np.sign(dy)))
    return next((name for name, direction in RELATIONS.items() if direction == way), "on")


def _matches(thing: RecognisedThing, noun: Noun) -> bool:
    return (
        thing.shape == noun.shape
        and (not noun.colour or thing.colour == noun.colour)
        and (noun.size is None or thing.size == noun.size)
    )
