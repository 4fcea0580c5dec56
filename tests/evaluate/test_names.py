"""Made-up names of the shapes world."""

from __future__ import annotations

import numpy as np
import pytest

from ragturbo.evaluate.faithfulness import count_answers
from ragturbo.evaluate.names import NAME_SPLITS, UNNAMED, lesson, made_up_word, named, sample_named_scene
from ragturbo.evaluate.recognition import recognise
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.scores import right_share
from ragturbo.evaluate.world import RARE, Noun, parse, vocabulary


def test_names_of_training_evaluation_and_demonstration_are_disjoint():
    rng = np.random.default_rng(0)
    words = {split: {made_up_word(rng, split) for _ in range(500)} for split in NAME_SPLITS}
    assert not words["train"] & words["eval"] | words["train"] & words["demo"] | words["eval"] & words["demo"]
    assert not set(vocabulary()) & set().union(*words.values())


@pytest.mark.parametrize(("names", "taught"), [(1, True), (1, False), (2, True), (2, None)])
def test_a_named_caption_means_what_its_picture_shows(names, taught):
    for seed in range(40):
        scene = sample_named_scene(seed, names=names, taught=taught)
        nouns = named(scene.meaning)
        assert len(nouns) == names and scene.meaning.split == "eval"
        if taught is not None:
            assert all((noun.kind in UNNAMED) != taught for noun in nouns)
        meaning = parse(scene.caption, {str(noun.name): noun.kind for noun in nouns})
        assert meaning.canonical == scene.meaning.canonical
        assert right_share(count_answers(meaning, recognise(render(scene)))) == 1
        for noun in nouns:
            assert noun.colour not in scene.caption.split() or any(n.colour == noun.colour for n in scene.meaning.nouns)


def test_a_lesson_shows_the_named_thing_alone_and_only_names_it():
    noun = Noun("star", "red", name="zib")
    captions = set()
    for seed in range(20):
        scene = lesson(noun, seed)
        captions.add(scene.caption)
        assert {(thing.shape, thing.colour) for thing in scene.things} == {("star", "red")}
        assert "zib" in scene.caption and "red" not in scene.caption and "star" not in scene.caption
        assert scene.meaning.split == "database"
    assert len(captions) > 5


def test_kinds_never_named_have_every_shape_and_colour_once_and_none_is_rare():
    assert len({shape for shape, _ in UNNAMED}) == len({colour for _, colour in UNNAMED}) == len(UNNAMED) == 8
    assert not UNNAMED & RARE


def test_a_name_that_begins_with_another_is_read_whole():
    meaning = parse("a zib left of two zibos", {"zib": ("star", "red"), "zibo": ("ring", "blue")})
    assert [noun.name for noun in meaning.nouns] == ["zib", "zibo"]
