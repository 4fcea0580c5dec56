"""Properties of the embedded model, measured by examples/shapes/measure.py."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import ragturbo
from ragturbo.evaluate.world import RARE, parse

SHAPES = Path(ragturbo.__file__).parent / "assets" / "shapes"


@pytest.fixture(scope="module")
def shapes():
    with ragturbo.Generator.from_pretrained("shapes", device="cpu") as generator:
        yield generator


@pytest.fixture(scope="module")
def captions() -> list[str]:
    database = ragturbo.Database.open(SHAPES / "database", verify="full")
    return [record.caption for record in database.records(np.arange(len(database)), thumbnails=False)]


def test_the_bundle_is_small_safe_and_says_where_it_comes_from():
    files = [path for path in SHAPES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24e6
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl")]
    said = json.loads((SHAPES / "ragturbo.json").read_text())["provenance"]
    assert len(said["commit"].rstrip("+")) == 40 and said["settings"]["seed"] and set(said["words"])
    assert {"text", "vae", "decoder", "tiny", "teacher", "student"} <= set(said["stages"])
    assert all("commit" in stage for stage in said["stages"].values())


def test_a_prompt_becomes_a_picture_that_its_seed_alone_decides(shapes):
    prompt = "a red circle left of a blue square"
    one, two, other = (np.asarray(shapes(prompt, seed=seed).images[0]) for seed in (7, 7, 8))
    assert one.shape == (64, 64, 3) and np.array_equal(one, two) and not np.array_equal(one, other)


def test_words_it_does_not_know_are_reported(shapes, caplog):
    with caplog.at_level("WARNING", logger="ragturbo"):
        shapes("a red dog beside a blue square", seed=1)
    assert "dog" in caplog.text and "square:" not in caplog.text


def test_the_tiny_autoencoder_draws_nearly_the_same_picture(shapes):
    prompt = "a red circle left of a blue square"
    with ragturbo.Generator.from_pretrained("shapes", device="cpu", vae="tiny") as tiny:
        small = np.asarray(tiny(prompt, seed=7).images[0], dtype=float)
    full, other = (np.asarray(shapes(prompt, seed=seed).images[0], dtype=float) for seed in (7, 8))
    assert np.abs(small - full).mean() < np.abs(other - full).mean() / 3


def test_the_database_covers_every_rare_kind_and_holds_no_caption_of_another_split(captions):
    meanings = [parse(caption) for caption in captions]
    assert len(meanings) >= 4_000
    assert {meaning.split for meaning in meanings} == {"database"}
    for kind in RARE:
        assert sum(kind in meaning.kinds for meaning in meanings) >= 60


def _measured(recipe, name: str, count: int) -> dict:
    measure = recipe["measure"]
    return measure.MEASURES[name](measure.Model(SHAPES), Namespace(count=count, seed=3, grid=None))


def test_a_key_finds_a_caption_that_names_the_same_things(recipe):
    found = _measured(recipe, "keys", 400)
    assert found["top4"] >= 0.9 and found["top4_rare"] >= 0.9


def test_the_h_space_carries_all_that_the_prompt_says(recipe):
    """With h from another prompt, the student's picture scores no better than one of another caption."""
    swapped = _measured(recipe, "swap", 120)
    assert swapped["cost"] >= 0.2 and swapped["swapped"]["overall"]["mean"] < 0.2
    assert swapped["swapped"]["categories"]["colour"]["mean"] < 0.1


def test_the_autoencoder_keeps_what_faithfulness_sees(recipe):
    assert _measured(recipe, "autoencoder", 120)["overall"]["mean"] >= 0.97


def test_a_word_taught_by_one_picture_is_drawn_until_it_is_forgotten(tmp_path):
    """The promise of the README, on 20 unseen captions with unseen names; names.json has the full count."""
    from PIL import Image

    from ragturbo import Database, Generator
    from ragturbo.evaluate.names import lesson, named, sample_named_scene
    from ragturbo.evaluate.recognition import recognise
    from ragturbo.evaluate.rendering import render

    scenes = [sample_named_scene(900 + i) for i in range(20)]
    nouns = [named(scene.meaning)[0] for scene in scenes]
    with Generator.from_pretrained("shapes", database=Database.copy("shapes", tmp_path / "db"), device="cpu") as gen:

        def right() -> int:
            images = gen([scene.caption for scene in scenes], seed=list(range(20)), output_type="uint8").images
            kinds = [{(thing.shape, thing.colour) for thing in recognise(image).things} for image in images]
            return sum(noun.kind in seen for noun, seen in zip(nouns, kinds, strict=True))

        before = right()
        lessons = [lesson(noun, i) for i, noun in enumerate(nouns)]
        ids = [gen.teach(scene.caption, Image.fromarray(render(scene))) for scene in lessons]
        taught = right()
        for id in ids:
            gen.forget(id)
        assert before <= 3 and right() == before and taught >= 8
