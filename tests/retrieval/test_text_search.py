"""`db.search` by text: which model encodes it, what is loaded for it, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ragturbo import Database
from ragturbo.errors import DatabaseMismatch, InvalidRequest, ModelError
from ragturbo.model.bundle import Bundle
from ragturbo.retrieval.build import append
from ragturbo.retrieval.encoder import BundleEncoder

CAPTIONS = ["a red circle", "a blue square", "a green triangle", "a photo of a cat", "a dog"]


@pytest.fixture(scope="module")
def bundle(tiny_sd21: Path) -> Bundle:
    torch.set_num_threads(1)
    return Bundle.load(tiny_sd21, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def built(bundle, plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "db"
    images = [image for _, image, _ in plain.pairs(len(CAPTIONS))]
    Database.build(list(zip(CAPTIONS, images, strict=True)), folder, model=bundle)
    return folder


def test_a_text_finds_the_pair_with_that_caption(built):
    database = Database.open(built)
    ids, scores = database.search("a blue square", k=3)
    assert ids.shape == scores.shape == (1, 3) and (ids.dtype, scores.dtype) == (np.int64, np.float32)
    assert database[ids[0, 0]].caption == "a blue square" and scores[0, 0] > 0.999
    for many in (CAPTIONS, tuple(CAPTIONS), np.array(CAPTIONS)):
        ids, scores = database.search(many)
        assert ids[:, 0].tolist() == [0, 1, 2, 3, 4] and (scores > 0.999).all()
    keys = database.keys(range(5)).numpy()
    np.testing.assert_array_equal(ids, database.search(keys)[0])


def test_a_text_is_searched_by_each_retriever_in_its_way(built):
    database = Database.open(built)
    assert database.search("a cat", k=1, retriever="bm25")[0].tolist() == [[3]]
    assert database.search(["a cat", "a dog"], k=1, retriever="hybrid")[0].tolist() == [[3], [4]]

    class Own:
        def search(self, keys, k, *, exclude=None):
            assert keys.shape == (2, 32) and keys.dtype == np.float32
            return np.zeros((2, k), np.int64), np.zeros((2, k), np.float32)

    assert database.search(["a", "b"], 2, retriever=Own())[0].shape == (2, 2)


@pytest.mark.parametrize("given", ["bundle", "name", "path", "recorded", "attribute"])
def test_the_model_may_be_a_bundle_a_folder_or_the_one_that_built_it(given, built, bundle, tiny_sd21):
    model = {"bundle": bundle, "name": str(tiny_sd21), "path": tiny_sd21}.get(given)
    database = Database.open(built, model=tiny_sd21 if given == "attribute" else None)
    assert database.search("a dog", model=model)[0].tolist() == [[4]]


def test_the_text_encoder_is_loaded_once_and_the_rest_of_the_model_never(built, tiny_sd21, tmp_path):
    """A search in a new process, by a model without UNet and VAE."""
    model = shutil.copytree(tiny_sd21, tmp_path / "model")
    for part in ("unet", "vae"):
        shutil.rmtree(model / part)
    database = Database.open(built, model=model)
    assert database.search("a dog")[0].tolist() == [[4]]
    shutil.rmtree(model)
    assert database.search("a dog")[0].tolist() == [[4]] == database.frozen().search("a dog")[0].tolist()


def test_a_search_by_text_with_another_model_is_refused(built, tiny, tmp_path):
    other = tiny.make_bundle(tmp_path / "other", seed=1)
    with pytest.raises(DatabaseMismatch, match="another text_encoder"):
        Database.open(built).search("a dog", model=other)
    with pytest.raises(DatabaseMismatch, match="another text_encoder"):
        Database.open(built).search("a dog", model=Bundle.load(other, device="cpu"))


def test_a_database_of_an_unknown_model_asks_for_it(built, plain, tiny_sd21, tmp_path):
    own = Database.build(plain.pairs(3), tmp_path / "own", encoder=plain.PixelEncoder())
    with pytest.raises(InvalidRequest, match="not known which model built .*own: pass model="):
        own.search("a dog")
    assert own.search("picture", retriever="bm25")[0].tolist() == [[0]]
    folder = shutil.copytree(built, tmp_path / "db")
    report = json.loads((folder / "build-report.json").read_text())
    assert report["model"] == str(tiny_sd21)
    (folder / "build-report.json").write_text(json.dumps({**report, "model": str(tmp_path / "gone")}))
    with pytest.raises(InvalidRequest, match="built by .*gone, which is not on this machine: pass model="):
        Database.open(folder).search("a dog")
    (folder / "build-report.json").write_text(json.dumps({**report, "model": "nobody/nothing"}))
    with pytest.raises(InvalidRequest, match="built by nobody/nothing, which is not on this machine"):
        Database.open(folder).search("a dog")
    with pytest.raises(ModelError, match="no folder"):
        Database.open(folder).search("a dog", model="nothing")


def test_a_manifest_names_no_model_and_a_copy_still_knows_it(built, tmp_path):
    for path in built.glob("gen-*/manifest.json"):
        assert "sd21" not in path.read_text()
    copied = Database.copy(built, tmp_path / "copy")
    assert copied.search("a dog")[0].tolist() == [[4]]


def test_the_database_of_a_model_is_searched_by_it_and_reports_no_path(tiny_sd21, plain, tmp_path):
    model = shutil.copytree(tiny_sd21, tmp_path / "model")
    images = [image for _, image, _ in plain.pairs(2)]
    database = Database.build(zip(CAPTIONS, images, strict=False), model / "database", model=model, device="cpu")
    assert str(tmp_path) not in (model / "database/build-report.json").read_text()
    moved = Database.open(shutil.move(model, tmp_path / "moved") / "database")
    assert moved.search("a blue square")[0].tolist() == [[1]] and database.report.model is None
    copied = Database.copy(moved.path, tmp_path / "copy")
    assert copied.report.model == str(tmp_path / "moved")


def test_the_embedded_models_database_and_its_copies_are_searched_by_text(tmp_path):
    from ragturbo.model.find import resolve

    embedded = Database.open(resolve("shapes") / "database")
    ids, _ = embedded.search("a red circle", k=3)
    assert "red circle" in embedded[ids[0, 0]].caption
    copied = Database.copy("shapes", tmp_path / "my-db")
    assert copied.report.model == "shapes"
    np.testing.assert_array_equal(copied.search("a red circle", k=3)[0], ids)


def test_an_append_needs_no_model_if_it_is_known_which_built_the_database(built, bundle, plain, tmp_path):
    folder = shutil.copytree(built, tmp_path / "db")
    database = Database.open(folder)
    report = database.append([("a cat and a dog", plain.pairs(1, 9)[0][1])])
    assert report.ids == [5] and database.search("a cat and a dog")[0].tolist() == [[5]]
    # An encoder without a name keeps the name that is known.
    encoder = BundleEncoder(bundle)
    encoder.bundle = None
    encoder.encode = BundleEncoder(bundle).encode
    assert append(plain.pairs(1, 8), folder, encoder=encoder).model == report.model
    with pytest.raises(InvalidRequest, match="not known which model"):
        Database.build(plain.pairs(2), tmp_path / "own", encoder=plain.PixelEncoder()).append(plain.pairs(1, 8))


def test_a_wrong_query_is_refused_in_words(built):
    database = Database.open(built)
    keys = database.keys([0, 1]).numpy()
    for query, options, message in (
        ("", {}, "the text to search by is empty"),
        ("a\ud800", {}, "keys is not valid Unicode"),
        (["a dog", " "], {}, "is empty"),
        (["a dog", 3], {}, "query 1 is 3, and others are texts"),
        (keys[0], {}, r"not \(32,\), which is one key: give keys\[None\]"),
        ([["a dog"]], {}, r"keys must be \(B, K\) numbers"),
        (None, {}, r"keys must be \(B, K\) numbers, not None"),
        (keys, {"model": "shapes"}, "model has no effect"),
        ("a dog", {"model": "shapes", "retriever": "bm25"}, "model has no effect"),
        ("a dog", {"texts": ["a"]}, "texts has no effect with retriever 'exact'"),
        ("a dog", {"k": 0}, "k must be a whole number"),
        ("a dog", {"k": 10**9}, "k must be a whole number from 1 to 65536"),
        ("a dog", {"centred": "x"}, "centred='x' must be True or False"),
        (keys, {"exclude": "x"}, "ids must be whole numbers, not texts"),
        ("a dog", {"retriever": "bm26"}, "did you mean 'bm25'"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            database.search(query, **options)


TORCHLESS = """
import sys
from ragturbo import Database
database = Database.open(sys.argv[1])
assert database.search("a dog", retriever="bm25")[0].tolist() == [[4]]
assert database[4].caption == "a dog" and [pair.id for pair in database] == [0, 1, 2, 3, 4]
heavy = {"torch", "diffusers", "transformers"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_search_by_words_and_a_look_at_pairs_import_no_torch(built):
    subprocess.run([sys.executable, "-c", TORCHLESS, str(built)], check=True)
