"""The retriever that searches: the requested one, else the database's own, else the device if the keys fit."""

from __future__ import annotations

import pytest
import torch

from ragturbo.engine.database import DatabaseGeneration
from ragturbo.engine.tables import _on_device
from ragturbo.retrieval import Database


class Own:
    """A retriever of the caller's, which may call itself as it likes."""

    name = "exact"

    def search(self, keys, k, *, exclude=None):
        raise AssertionError("not searched here")


@pytest.fixture
def free_memory(monkeypatch):
    def set_free(keys: float, database: Database) -> None:
        free = int(keys * database.snapshot.keys.nbytes)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))

    return set_free


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("opened", "named", "on_device"),
    [
        ("bm25", "auto", False),
        (Own(), "auto", False),
        ("exact", "auto", True),
        ("exact", "bm25", False),
        ("bm25", "exact", True),
        ("auto", Own(), False),
        ("auto", "bm25", False),
        ("auto", "exact", True),
    ],
)
def test_a_retriever_that_was_asked_for_is_kept(database_folder, free_memory, device, opened, named, on_device):
    database = Database.open(database_folder, retriever=opened)
    free_memory(100, database)
    source = DatabaseGeneration(database, named, device=device)
    assert _on_device(source, torch.device(device)) is on_device
    if not on_device:
        asked_for = opened if named == "auto" else named
        found = source._retriever
        assert found is asked_for or found.name == asked_for


@pytest.mark.parametrize(("room", "indexed", "on_device"), [(5, True, True), (3, True, False), (3, False, True)])
def test_nobody_asked_for_one_and_the_device_searches_if_the_keys_fit_or_there_is_no_index(
    database_folder, free_memory, monkeypatch, room, indexed, on_device
):
    def unused(*_):
        raise AssertionError("a retriever was made")

    database = Database.open(database_folder)
    monkeypatch.setattr(Database, "choice", lambda self: ("scann" if indexed else "exact", "a test says so"))
    monkeypatch.setattr(Database, "retriever", unused)
    free_memory(room, database)
    source = DatabaseGeneration(database, device="cuda")
    assert _on_device(source, torch.device("cuda")) is on_device


def test_centred_keys_need_twice_the_room(database_folder, free_memory, monkeypatch):
    source = DatabaseGeneration(Database.open(database_folder), device="cuda")
    monkeypatch.setattr(Database, "choice", lambda self: ("scann", "a test says so"))
    for centred in (False, True):
        object.__setattr__(source.database.snapshot.manifest, "centred", centred)
        free_memory(7, source.database)
        assert _on_device(source, torch.device("cuda")) is not centred


def test_what_cannot_be_made_is_refused_when_the_database_is_opened(database_folder, monkeypatch):
    def missing(*_):
        raise RuntimeError("bm25s is not installed")

    monkeypatch.setattr(Database, "_make", missing)
    with pytest.raises(RuntimeError, match="not installed"):
        DatabaseGeneration(Database.open(database_folder), "bm25", device="cuda")
