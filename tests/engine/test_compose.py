"""Neighbours for each phrase of a prompt, and names found by their words, from the prompt to the blended feature."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from ragturbo import Database, Generator
from ragturbo.engine.database import DatabaseGeneration
from ragturbo.errors import ModelError
from ragturbo.model.info import BundleInfo

PROMPTS = ["a red circle left of a blue square", "a green cat above a yellow dog beside a red square"]
PHRASES = [["a red circle", "a blue square"], ["a green cat", "a yellow dog", "a red square"]]
FORMS = {
    "one graph": {"retriever": "exact"},
    "ids to the host": {"retriever": "exact", "host_bytes": 16 * 512},
    "three graphs": {"retriever": "bm25"},
    "three graphs, keys and words": {"retriever": "hybrid"},
}


def equal(got, expected) -> bool:
    names = ("latents", "ids", "scores", "lam", "lams", "cosine", "bm25", "valid", "ok")
    return all(torch.equal(getattr(got, n).nan_to_num(-7), getattr(expected, n).nan_to_num(-7)) for n in names)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("mode", "k", "steps"), [("adapter", 1, 1), ("adapter", 2, 2), ("slerp", 2, 1)])
def test_both_engines_agree_on_the_phrases(database, reference, graph_engine, make_composed, form, mode, k, steps):
    source = DatabaseGeneration(database, **FORMS[form])
    batch = make_composed(PROMPTS, source, mode=mode, num_neighbors=k, num_inference_steps=steps)
    engine = graph_engine()
    got, expected = engine.run(batch), reference.run(batch)
    assert float((got.latents - expected.latents).norm() / expected.latents.norm()) < 1e-5
    for name in ("ids", "valid"):
        assert torch.equal(getattr(got, name), getattr(expected, name))
    for name in ("lam", "lams", "scores", "cosine", "bm25"):
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), atol=2e-3, rtol=0, equal_nan=True)
    assert engine.describe()["retrieval"] == form.split(",")[0]
    # The control: the whole prompts find other neighbours and give other images.
    whole = reference.run(make_composed(PROMPTS, source, compose=False, mode=mode, num_neighbors=k))
    assert not torch.allclose(whole.latents, expected.latents, atol=1e-3)


@pytest.mark.parametrize("form", FORMS)
def test_each_phrase_finds_what_it_finds_alone_and_padding_finds_nothing(database, reference, make_composed, form):
    source = DatabaseGeneration(database, **FORMS[form])
    got = reference.run(make_composed(PROMPTS, source, num_neighbors=2))
    assert got.ids.shape == (2, 8)
    for row, found in enumerate(PHRASES):
        for i, phrase in enumerate(found):
            alone = reference.run(make_composed([phrase], source, num_neighbors=2))
            part = slice(2 * i, 2 * i + 2)
            assert torch.equal(got.ids[row, part], alone.ids[0])
            torch.testing.assert_close(got.lams[row, part], alone.lams[0], atol=1e-5, rtol=0)
        padding = got.ids[row, 2 * len(found) :]
        assert (padding == -1).all() and not got.valid[row, 2 * len(found) :].any()
    assert torch.equal(got.lam, got.lams.amax(1))


@pytest.mark.parametrize("form", FORMS)
def test_a_replay_is_the_call_bit_for_bit(database, graph_engine, replayed_engine, make_composed, form):
    source = DatabaseGeneration(database, **FORMS[form])
    replayed, called = replayed_engine(), graph_engine()
    for seed, prompts in enumerate([PROMPTS, PROMPTS[::-1], ["a cat", "a dog, a cat, a red square and a circle"]]):
        batch = make_composed(prompts, source, seed=seed)
        assert equal(replayed.run(batch), called.run(batch))
    assert len(replayed.describe()["graphs"]) == 1


def test_a_given_lambda_replaces_that_of_every_phrase(source, reference, graph_engine, make_composed):
    batch = make_composed(PROMPTS, source, lam=0.4)
    for engine in (reference, graph_engine()):
        got = engine.run(batch)
        assert got.lam.tolist() == pytest.approx([0.4, 0.4])
        assert got.lams[got.valid].tolist() == pytest.approx([0.4] * 5) and not got.lams[~got.valid].any()
    zero = reference.run(make_composed(PROMPTS, source, lam=0.0)).latents
    assert torch.equal(zero, reference.run(make_composed(PROMPTS, source, compose=None, mode="none")).latents)


@pytest.fixture
def named(write_database, tmp_path) -> Path:
    """The twenty captions, and two that name what no other does."""
    from conftest import CAPTIONS

    folder = tmp_path / "named"
    write_database(folder, [*CAPTIONS, "a zib", "a red wug"])
    return folder


@pytest.mark.parametrize("engine", ["reference", "graph"])
def test_a_name_is_found_first_at_full_strength(model_folder, named, engine):
    options = {"capture": False} if engine == "graph" else {}
    prompt = "two zibs left of a blue square"
    with Generator.from_pretrained(
        model_folder, database=named, device="cpu", retriever="hybrid", engine=engine, **options
    ) as gen:
        whole = gen(prompt, seed=1)
        assert whole.neighbors[0][0].caption == "a zib" and gen.info["retriever"] == "hybrid"
        # The square, which the model knows, gets no neighbour that could be mistaken for the zib.
        for k in (2, 1):
            [[zib]] = gen(prompt, seed=1, compose=True, num_neighbors=k).neighbors
        assert zib.caption == "a zib"
        assert zib.lam == 1.0 > zib.cosine > 0 and zib.bm25 > 0 and zib.score > 1
        both = gen([prompt, "a wug", "a cat, a dog and a wug"], seed=1, compose=True, output_type="np")
        assert [[n.caption for n in row][-1] for row in both.neighbors] == ["a zib", "a red wug", "a red wug"]
        assert both.lam == [1.0] * 3


def test_an_appended_pair_is_found_by_the_next_request_and_a_removed_one_is_not(model_folder, named, write_database):
    with Generator.from_pretrained(model_folder, database=named, device="cpu", retriever="hybrid") as gen:
        first = gen("a blick above a cat", seed=1)
        assert first.neighbors[0][0].caption != "a blick"
        write_database(named, ["a blick"], seed=3)
        gen.database.refresh()
        [found] = gen("two blicks above a cat", seed=1).neighbors[0]
        assert found.caption == "a blick"
        gen.database.remove([found.id])
        assert gen("two blicks above a cat", seed=1).neighbors[0][0].caption != "a blick"


def test_one_phrase_gives_the_bytes_of_the_whole_prompt(model_folder, database_folder):
    with Generator.from_pretrained(model_folder, database=database_folder, device="cpu") as gen:
        for prompt in ("a red circle", "a picture of a red circle on a white background", "the left"):
            plain, composed = (gen(prompt, seed=1, output_type="np", compose=c) for c in (False, True))
            assert (plain.images == composed.images).all() and plain.lam == composed.lam
            assert [n.id for n in plain.neighbors[0]] == [n.id for n in composed.neighbors[0]]


def test_prompts_of_any_phrase_count_give_their_own_image_in_any_company(model_folder, database_folder):
    prompts = ["a red circle", *PROMPTS, "a cat and a dog", "a cat, a dog, a circle, a square and a triangle"]
    with Generator.from_pretrained(model_folder, database=database_folder, device="cpu", compose=True) as gen:
        together = gen(prompts, seed=1, output_type="np")
        futures = [gen.submit(prompt, seed=1, output_type="np") for prompt in prompts * 3]
        assert together.notes[-1] == f"prompt {prompts[-1]!r}: its last 2 phrases are searched as one"
        for i, future in enumerate(futures):
            row, alone = i % len(prompts), future.result()
            assert abs(alone.images[0] - together.images[row]).max() < 1e-4
            assert [n.id for n in alone.neighbors[0]] == [n.id for n in together.neighbors[row]]


def test_the_bundle_says_how_its_adapter_was_trained(model_folder, named, tmp_path):
    model = shutil.copytree(model_folder, tmp_path / "model")
    info = (
        json.loads((model / "ragturbo.json").read_text()) if (model / "ragturbo.json").exists() else {"distilled": True}
    )
    (model / "ragturbo.json").write_text(json.dumps(info | {"retriever": "hybrid", "compose": True}))
    prompt = "two zibs left of a blue square"
    with Generator.from_pretrained(model, database=named, device="cpu") as gen:
        assert [n.caption for n in gen(prompt).neighbors[0]] == ["a zib"]
        assert len(gen("a red circle left of a blue square").neighbors[0]) == 2
        assert (gen.info["retriever"], gen.info["compose"]) == ("hybrid", True)
        assert len(gen(prompt, compose=False).neighbors[0]) == 1
        assert gen(prompt, mode="none").mode == "none" and len(gen(prompt, neighbors=[1]).neighbors[0]) == 1
    for options, captions in (
        ({"retriever": "exact", "compose": False}, 1),
        ({"compose": lambda text: text.split(" left of ")}, 1),
    ):
        with Generator.from_pretrained(model, database=named, device="cpu", **options) as gen:
            assert len(gen(prompt).neighbors[0]) == captions
    # A database that was opened with a retriever keeps it.
    with Generator.from_pretrained(model, database=Database.open(named, retriever="exact"), device="cpu") as gen:
        assert gen.info["retriever"] == "exact"
    with pytest.raises(ModelError, match="retriever is 'faiss'"):
        BundleInfo(distilled=True, retriever="faiss")
    with pytest.raises(ModelError, match="compose is 'yes'"):
        BundleInfo(distilled=True, compose="yes")


def test_a_warm_generator_has_recorded_every_number_of_phrases(model_folder, database_folder):
    with Generator.from_pretrained(
        model_folder, database=database_folder, device="cpu", engine="graph", capture=False, compose=True,
        batch_sizes=(1,),
    ) as gen:  # fmt: skip
        gen.warmup()
        recorded = {graph["kind"] for graph in gen.info["ways"]["graphs"]}
        for prompt in ("a cat", *PROMPTS):
            gen(prompt, seed=1, output_type="uint8")
        assert len(recorded) == 3 and {graph["kind"] for graph in gen.info["ways"]["graphs"]} == recorded
