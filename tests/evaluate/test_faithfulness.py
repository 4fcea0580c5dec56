"""Exact faithfulness: perfect on true pictures, at chance on wrong ones; every category can fail on its own."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate.faithfulness import CATEGORIES, answer, count_answers, questions
from ragturbo.evaluate.recognition import RecognisedPicture, RecognisedThing, components, recognise
from ragturbo.evaluate.rendering import PALETTE, render
from ragturbo.evaluate.scores import right_share
from ragturbo.evaluate.world import GROUNDS, Meaning, Noun, Scene, Thing, parse, sample_scenes


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return sample_scenes(600, 21, "eval")


@pytest.fixture(scope="module")
def pictures(scenes) -> list[np.ndarray]:
    return [render(scene) for scene in scenes]


def score(captions: list[str], pictures: list[np.ndarray | RecognisedPicture]) -> dict[str, float]:
    """The mean over all captions, over those without and with a rare kind, and the share of each category."""
    groups: dict[str, list[float]] = {"overall": [], "common": [], "rare": []}
    totals = {name: np.zeros(2) for name in CATEGORIES}
    for caption, picture in zip(captions, pictures, strict=True):
        meaning = parse(caption)
        counts = count_answers(meaning, picture if isinstance(picture, RecognisedPicture) else recognise(picture))
        for name in ("overall", "rare" if meaning.rare else "common"):
            groups[name].append(right_share(counts))
        for name, pair in counts.items():
            totals[name] += pair
    means = {name: float(np.mean(values)) for name, values in groups.items()}
    return means | {name: right / asked for name, (right, asked) in totals.items()}


def test_ground_truth_scores_at_least_995_in_every_category(scenes, pictures):
    assert min(score([scene.caption for scene in scenes], pictures).values()) >= 0.995


def test_wrong_captions_score_what_chance_alone_gives(scenes, pictures):
    """Chance is exact here: the same wrong captions on the scenes themselves, without rendering."""
    wrong = [scene.caption for scene in scenes[1:] + scenes[:1]]
    exact = [
        RecognisedPicture(s.ground, tuple(RecognisedThing(t.shape, t.colour, t.size, t.x, t.y) for t in s.things))
        for s in scenes
    ]
    found, chance = score(wrong, pictures), score(wrong, exact)
    assert found["overall"] == pytest.approx(chance["overall"], abs=0.01)
    assert found["overall"] < 0.25 and found["colour"] < 0.1 and found["spatial"] < 0.1


def test_soft_and_noisy_pictures_are_still_read(scenes, pictures, rng):
    soft = [np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.6))) for picture in pictures]
    noisy = [np.clip(picture + rng.normal(0, 6, picture.shape), 0, 255).astype(np.uint8) for picture in pictures]
    captions = [scene.caption for scene in scenes]
    assert score(captions, soft)["overall"] > 0.98
    assert score(captions, noisy)["overall"] > 0.98


def _draw(*things: Thing, ground: str = "white") -> np.ndarray:
    return render(Scene(Meaning((), None, ground), "", things))


RED_CIRCLE = Thing("circle", "red", "medium", 18.0, 32.0)
BLUE_SQUARE = Thing("square", "blue", "small", 46.0, 30.0)
SWAPPED = (Thing("circle", "red", "medium", 46.0, 32.0), Thing("square", "blue", "small", 18.0, 30.0))
ASKED = "a red circle left of a small blue square on a white background"


@pytest.mark.parametrize(
    ("things", "ground", "wrong"),
    [
        ((RED_CIRCLE, BLUE_SQUARE), "white", set()),
        ((RED_CIRCLE, BLUE_SQUARE), "brown", {"background"}),
        ((RED_CIRCLE, Thing("square", "blue", "large", 46.0, 30.0)), "white", {"size"}),
        ((RED_CIRCLE, BLUE_SQUARE, Thing("star", "green", "small", 32.0, 54.0)), "white", {"counting"}),
        (SWAPPED, "white", {"spatial"}),
        ((Thing("circle", "pink", "medium", 18.0, 32.0), BLUE_SQUARE), "white", {"colour", "spatial"}),
        ((Thing("ring", "red", "medium", 18.0, 32.0), BLUE_SQUARE), "white", {"object", "colour", "spatial"}),
        ((RED_CIRCLE,), "white", {"object", "colour", "size", "counting", "spatial"}),
        ((), "white", {"object", "colour", "size", "counting", "spatial"}),
    ],
)
def test_one_thing_wrong_is_one_kind_of_answer_wrong(things, ground, wrong):
    counts = count_answers(parse(ASKED), recognise(_draw(*things, ground=ground)))
    assert {category for category, (right, asked) in counts.items() if right < asked} == wrong


def test_counts_are_counted():
    meaning = parse("two yellow stars and a green ring")
    stars = [Thing("star", "yellow", "medium", 16.0, 16.0), Thing("star", "yellow", "medium", 48.0, 16.0)]
    ring = Thing("ring", "green", "medium", 16.0, 48.0)
    counting = [q for q in questions(meaning) if q.category == "counting"]
    assert [(q.nouns, q.expected) for q in counting] == [((Noun("star", "yellow"),), "2"), ((), "3")]
    assert [answer(q, recognise(_draw(*stars, ring))) for q in counting] == ["2", "3"]
    assert [answer(q, recognise(_draw(stars[0], ring))) for q in counting] == ["1", "2"]


def test_a_smear_is_no_shape(rng):
    smear = np.full((64, 64, 3), PALETTE["white"], np.uint8)
    smear[30:34, 5:60] = PALETTE["red"]
    (thing,) = recognise(smear).things
    assert thing.shape is None and thing.colour == "red"
    assert recognise(np.full((64, 64, 3), 128, np.uint8)).things == ()
    assert recognise(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)) is not None


def test_touching_things_of_two_colours_are_two():
    left, right = Thing("square", "red", "medium", 24.0, 32.0), Thing("square", "blue", "medium", 39.75, 32.0)
    assert sorted(thing.colour for thing in recognise(_draw(left, right)).things) == ["blue", "red"]


@pytest.mark.parametrize("ground", GROUNDS)
def test_every_ground_is_known(ground):
    assert recognise(_draw(RED_CIRCLE, ground=ground)).ground == ground


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.9))
@settings(max_examples=50, deadline=None)
def test_components_partition_a_mask_into_connected_parts(seed, density):
    mask = np.random.default_rng(seed).random((16, 16)) < density
    parts = list(components(mask))
    assert np.array_equal(np.sum(parts, axis=0) if parts else np.zeros((16, 16)), mask.astype(int))
    for part in parts:
        reached = np.zeros_like(part)
        reached[tuple(np.argwhere(part)[0])] = True
        for _ in range(part.sum()):
            wide = np.pad(reached, 1)
            reached = part & (reached | wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:])
        assert np.array_equal(reached, part)
        # Four-connected to no other part.
        wide = np.pad(part, 1)
        around = wide[:-2, 1:-1] | wide[2:, 1:-1] | wide[1:-1, :-2] | wide[1:-1, 2:]
        assert not (around & mask & ~part).any()


def test_pictures_of_another_size_are_refused():
    with pytest.raises(InvalidRequest, match="64"):
        recognise(np.zeros((32, 32, 3), np.uint8))


def test_the_meaning_of_a_noun_is_asked_once():
    asked = questions(Meaning((Noun("circle", "red"), Noun("circle", "blue")), "above"))
    assert [q.category for q in asked] == ["object", "colour", "colour", "counting", "spatial"]
