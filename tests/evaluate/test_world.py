"""The shapes world: deterministic scenes, a closed vocabulary, disjoint splits, unambiguous pictures."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.rendering import coverage, render
from ragturbo.evaluate.world import (
    COLOURS,
    RARE,
    SHAPES,
    SIDE,
    SIZES,
    SPLITS,
    all_kind_sets,
    parse,
    phrase,
    sample_scene,
    sample_scenes,
    vocabulary,
)

seeds = st.integers(0, 2**40)
splits = st.sampled_from(list(SPLITS))


@given(seeds, splits, st.sampled_from([None, True, False]))
@settings(max_examples=200, deadline=None)
def test_a_scene_is_a_function_of_its_seed(seed, split, rare):
    one, two = (sample_scene(seed, split, rare=rare) for _ in range(2))
    assert one == two
    assert np.array_equal(render(one), render(two))


def test_a_kind_that_a_small_split_lacks_is_refused():
    with pytest.raises(InvalidRequest, match="no scene of split 'demo'"):
        sample_scene(1, "demo", kinds=(("circle", "red"),))


@given(seeds, splits)
@settings(max_examples=300, deadline=None)
def test_a_caption_says_the_whole_meaning_and_no_more(seed, split):
    scene = sample_scene(seed, split)
    assert parse(scene.caption).canonical == scene.meaning.canonical
    assert set(scene.caption.split()) <= set(vocabulary())


@given(seeds, splits, seeds)
@settings(max_examples=300, deadline=None)
def test_every_phrasing_of_a_meaning_stays_in_its_split(seed, split, other):
    meaning = sample_scene(seed, split).meaning
    assert parse(phrase(meaning, np.random.default_rng(other))).split == split


@given(seeds, splits)
@settings(max_examples=300, deadline=None)
def test_things_stand_apart_inside_the_picture_where_the_caption_says(seed, split):
    scene = sample_scene(seed, split)
    for i, thing in enumerate(scene.things):
        reach = SIZES[thing.size]
        assert reach < thing.x < SIDE - reach and reach < thing.y < SIDE - reach
        for other in scene.things[:i]:
            gap = max(abs(thing.x - other.x), abs(thing.y - other.y)) - reach - SIZES[other.size]
            assert gap >= 3
    relation = scene.meaning.relation
    if relation:
        a, b = scene.things
        ahead = {"left of": b.x - a.x, "right of": a.x - b.x, "above": b.y - a.y, "below": a.y - b.y}
        assert max(ahead, key=ahead.__getitem__) == relation


def test_splits_share_no_meaning():
    meanings = {split: {s.meaning.canonical for s in sample_scenes(1500, 3, split)} for split in SPLITS}
    for one in SPLITS:
        for other in SPLITS:
            assert one == other or meanings[one].isdisjoint(meanings[other])


def test_rare_kinds_are_two_of_every_shape_and_leave_scenes_when_asked():
    assert len(RARE) == 2 * len(SHAPES)
    assert all(sum(kind[0] == shape for kind in RARE) == 2 for shape in SHAPES)
    assert all(sum(kind[1] == colour for kind in RARE) == 2 for colour in COLOURS)
    assert not any(scene.meaning.rare for scene in sample_scenes(500, 5, "train", rare=False))
    assert all(scene.meaning.rare for scene in sample_scenes(200, 5, "eval", rare=True))


def test_the_database_split_can_show_every_set_of_kinds(rng):
    sets = all_kind_sets()
    assert len(sets) == 64 + 64 * 63 // 2
    for i in rng.choice(len(sets), 200, replace=False):
        assert sample_scene(int(i), "database", kinds=sets[i]).meaning.kinds == frozenset(sets[i])


def test_the_world_is_as_rich_as_promised():
    captions = [scene.caption for scene in sample_scenes(3000, 9, "train")]
    words = {word for caption in captions for word in caption.split()}
    assert {*SHAPES, *COLOURS} <= words and len(SHAPES) >= 8 and len(COLOURS) >= 8
    assert {"two", "three", "above", "below", "left", "right", "small", "large"} <= words
    assert len(set(captions)) > 2800


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("radius", sorted(SIZES.values()))
def test_coverage_moves_with_the_centre_and_keeps_its_area(shape, radius):
    areas = [coverage(shape, radius, x, y).sum() for x in (0.0, 0.25, 0.5) for y in (0.0, 0.75)]
    assert max(areas) - min(areas) < 0.01 * max(areas)


@pytest.mark.parametrize(
    "caption",
    ["", "a dog", "a red circle and a blue square and a green star", "three red rings and a blue star"],
)
def test_what_the_world_cannot_show_is_refused_with_the_caption(caption):
    with pytest.raises(InvalidRequest, match="shapes world"):
        parse(caption)
