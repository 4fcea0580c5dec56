"""`Output.notes` and the log: words that the model does not know, and where retrieval found them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from PIL import Image

from ragturbo import Database, Generator
from ragturbo.errors import DatabaseCorrupt
from ragturbo.model.text import TextEncoder

CAPTIONS = ["a red circle", "a zib", "two frobs on a box", "a blue square"]


@pytest.fixture
def closed_vocabulary(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """CLIP's vocabulary has every word; this one has those of the tiny models' captions, and plurals."""
    known = {*tiny.WORDS.split(), "two", "circles"}

    def unknown(self: TextEncoder, prompt: str, encoding: object) -> tuple[str, ...]:
        return tuple(dict.fromkeys(word for word in prompt.split() if word not in known))

    monkeypatch.setattr(TextEncoder, "_unknown", unknown)


@pytest.fixture
def gen(closed_vocabulary, model_folder, write_database: Callable[..., Database], tmp_path) -> Iterator[Generator]:
    write_database(tmp_path / "db", CAPTIONS)
    with Generator.from_pretrained(model_folder, database=tmp_path / "db", device="cpu", retriever="bm25") as generator:
        yield generator


def notes(gen: Generator, prompt: str | list[str], **options: object) -> list[str]:
    return gen(prompt, seed=1, output_type="uint8", **{"num_neighbors": 1, **options}).notes


def test_the_note_names_the_pair_that_has_the_word_in_singular_or_plural(gen):
    assert notes(gen, "a zib") == ["prompt 'a zib': the model does not know zib: found in pair 1 'a zib'"]
    assert notes(gen, "zibs") == ["prompt 'zibs': the model does not know zibs: found in pair 1 'a zib'"]
    assert notes(gen, "a frob") == [
        "prompt 'a frob': the model does not know frob: found in pair 2 'two frobs on a box'"
    ]
    assert notes(gen, "a red circle") == []


def test_the_note_says_that_a_word_is_not_in_the_database_until_it_is_removed(gen):
    assert notes(gen, "a red wug") == ["prompt 'a red wug': the model does not know wug: not in the database"]
    gen.database.remove([1])
    assert notes(gen, "a zib") == ["prompt 'a zib': the model does not know zib: not in the database"]


def test_the_note_says_if_the_pair_with_the_word_was_not_used(gen):
    [note] = notes(gen, "a zib", query="a red circle")
    assert note == "prompt 'a zib': the model does not know zib: in pair 1 'a zib', which was not used"
    [note] = notes(gen, "a zib", min_score=1e6)
    assert note.endswith("zib: in pair 1 'a zib', which was not used")


def test_each_word_and_each_prompt_has_its_own_place(gen):
    found = notes(gen, ["a zib wug", "a red circle", "a frob", "a frob"], num_images_per_prompt=2)
    assert found == [
        "prompt 'a zib wug': the model does not know zib: found in pair 1 'a zib'; wug: not in the database",
        "prompt 'a frob': the model does not know frob: found in pair 2 'two frobs on a box'",
    ]


def test_neighbours_of_the_caller_are_searched_for_the_word(gen):
    picture = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    [note] = notes(gen, "two wugs", neighbors=[("a wug", picture)], num_neighbors=None)
    assert note == "prompt 'two wugs': the model does not know wugs: found in the given pair 'a wug'"
    assert notes(gen, "a zib", neighbors=[1], num_neighbors=None)[0].endswith("zib: found in pair 1 'a zib'")
    assert notes(gen, "a zib", neighbors=[0], num_neighbors=None)[0].endswith("zib: not in the given pairs")


def test_without_retrieval_the_note_only_names_the_words(gen):
    assert notes(gen, "a zib wug", mode="none", num_neighbors=None) == [
        "prompt 'a zib wug': the model does not know: zib, wug"
    ]


def test_a_taught_word_is_found_by_the_next_request(gen, monkeypatch):
    """The database is a test's own; only what a reader sees of it matters here."""
    from ragturbo.retrieval import one_pair

    monkeypatch.setattr(one_pair, "check_encoder", lambda *arguments: None)
    assert notes(gen, "two wugs")[0].endswith("wugs: not in the database")
    id = gen.teach("a wug", Image.fromarray(np.zeros((8, 8, 3), np.uint8)))
    assert notes(gen, "two wugs")[0].endswith(f"wugs: found in pair {id} 'a wug'")


def test_the_log_has_the_completed_note_once_for_every_way_to_call(gen, caplog):
    line = "prompt 'a zib': the model does not know zib: found in pair 1 'a zib'"
    for call in (
        lambda: gen("a zib", seed=1),
        lambda: gen.submit("a zib", seed=1).result(),
        lambda: asyncio.run(gen.agenerate("a zib", seed=1)),
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "ragturbo"):
            assert call().notes == [line]
        assert [record.getMessage() for record in caplog.records] == [line]


def test_no_note_is_logged_if_prompts_may_not_be_nor_at_warm_up(gen, model_folder, caplog):
    with caplog.at_level(logging.WARNING, "ragturbo"):
        gen.warmup()
        with Generator.from_pretrained(model_folder, database=gen.database, device="cpu", log_prompts=False) as quiet:
            assert quiet("a zib", seed=1).notes
    assert caplog.records == []


def test_a_damaged_caption_leaves_the_image_and_the_words(gen, monkeypatch):
    from ragturbo.retrieval.snapshot import Snapshot

    def damaged(self: Snapshot, id: int, thumbnail: bool = True) -> None:
        raise DatabaseCorrupt("segments/000000.parquet: its CRC-32 is not that of the manifest")

    monkeypatch.setattr(Snapshot, "record", damaged)
    assert notes(gen, "a zib") == ["prompt 'a zib': the model does not know: zib"]
