"""A neighbour's thumbnail adds no work to a request: it is read on access, from the generation it was found in."""

from __future__ import annotations

import dataclasses
import pickle
import shutil

import numpy as np
import pytest

import ragturbo
from ragturbo.model.find import resolve
from ragturbo.retrieval.pairs import PairsFile


@pytest.fixture
def database(tmp_path):
    return shutil.copytree(resolve("shapes") / "database", tmp_path / "db")


def test_a_thumbnail_is_read_when_it_is_looked_at(database, monkeypatch):
    asked = []
    read = PairsFile._thumbnails
    monkeypatch.setattr(PairsFile, "_thumbnails", lambda self, group: asked.append(group) or read(self, group))
    with ragturbo.Generator.from_pretrained("shapes", device="cpu", database=database) as gen:
        found = gen("a red circle", seed=1, num_neighbors=2).neighbors[0]
        assert found[0].caption and not asked
        assert found[0].image().size == (64, 64) and len(asked) == 1


def test_it_outlives_the_generator_a_compaction_and_a_pickle(database):
    db = ragturbo.Database.open(database)
    with ragturbo.Generator.from_pretrained("shapes", device="cpu", database=database) as gen:
        (found,) = gen("a red circle", seed=1).neighbors[0]
    expected = db.records([found.id])[0].thumbnail
    db.remove([found.id])
    db.compact()
    assert found.thumbnail == expected
    again = pickle.loads(pickle.dumps(found))
    assert again == found and again.thumbnail == expected
    assert np.asarray(again.image()).shape == (64, 64, 3)


def test_a_record_is_read_when_it_is_looked_at_and_once(database, monkeypatch):
    asked = []
    read = PairsFile.record
    monkeypatch.setattr(PairsFile, "record", lambda self, *args: asked.append(args) or read(self, *args))
    with ragturbo.Generator.from_pretrained("shapes", device="cpu", database=database) as gen:
        (found,) = gen("a red circle", seed=1).neighbors[0]
        (record,) = gen.database.records([found.id])
    asked.clear()
    assert found.id == record.id and found.used and 0 < found.lam <= 1 and not asked
    assert (found.caption, found.source, found.metadata) == (record.caption, record.source, record.extra)
    assert found.metadata is found.metadata and len(asked) == 1
    assert dataclasses.replace(found, score=1.0).caption == record.caption
    assert repr(record.caption) in repr(found) and len(asked) == 1
    with pytest.raises(AttributeError, match="captions"):
        found.captions  # noqa: B018
