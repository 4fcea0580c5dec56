"""The contents of a database after changes: ids, removed pairs, generations, and the records of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from ragturbo import Database
from ragturbo.errors import DatabaseCorrupt, InvalidRequest
from ragturbo.retrieval import Geometry, Record

GEOMETRY = Geometry(1, 1, 8, "float16", 32)


def random_keys(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, 32)).astype(np.float32)


def batch(n: int, seed: int) -> tuple:
    records = [Record(0, f"caption {i}", f"site-{i % 5}", extra={"year": 2000 + i % 3}) for i in range(n)]
    return records, random_keys(n, seed), np.arange(n * 8, dtype=np.float32).reshape(-1, 1, 8) % 1000


def test_ids_are_never_reused_and_quarantine_takes_a_source_out(plain, tmp_path):
    database = Database.write(tmp_path / "db", [batch(30, 1)], geometry=GEOMETRY, segment_records=8)
    assert database.remove(where={"source": "site-2"}) == 6
    assert database.remove(where={"source": ["site-3", "site-4"], "year": 2001}) == 4
    assert database.remove(where={"source": "site-2"}) == 0
    left = {record.id for record in database.records(database.ids)}
    assert all(record.source != "site-2" for record in database.records(database.ids)) and len(left) == 20
    keys = random_keys(30, 1)
    assert not {*range(30)} - left & set(database.search(keys, 30)[0].ravel().tolist())
    database.remove([29] if 29 in left else [0])
    database.compact()
    plain.append_encoded(database, [batch(3, 2)])
    assert database.ids[-3:].tolist() == [30, 31, 32]
    for bad in ({}, {"planet": "x"}):
        with pytest.raises(InvalidRequest):
            database.remove(where=bad)
    with pytest.raises(InvalidRequest, match="not in this database"):
        database.remove([999])
    with pytest.raises(InvalidRequest, match="ids, or where=.*given neither"):
        database.remove()


def test_a_removal_takes_effect_at_once_and_a_frozen_view_keeps_its_generation(plain, tmp_path):
    database = Database.write(tmp_path / "db", [batch(30, 1)], geometry=GEOMETRY)
    other, frozen = Database.open(tmp_path / "db"), database.frozen()
    keys = random_keys(30, 1)[4:5]
    database.remove([4])
    assert database.search(keys, 1)[0][0, 0] != 4
    assert frozen.search(keys, 1)[0][0, 0] == 4 and other.search(keys, 1)[0][0, 0] == 4
    assert other.refresh() and not other.refresh()
    assert other.search(keys, 1)[0][0, 0] != 4
    database.compact()
    plain.append_encoded(database, [batch(2, 3)])
    # Its files are deleted, but it can still read those that it has open.
    assert frozen.records([4])[0].caption == "caption 4" and frozen.rows([4]).shape == (1, 16)


def test_a_thumbnail_of_a_large_segment_is_read_by_its_page_and_checked(tmp_path):
    records, keys, features = batch(600, 1)
    thumbnails = [np.random.default_rng(i).bytes(3000) for i in range(600)]
    records = [Record(0, r.caption, r.source, thumbnail=t) for r, t in zip(records, thumbnails, strict=True)]
    database = Database.write(tmp_path / "db", [(records, keys, features)], geometry=GEOMETRY)
    path = tmp_path / "db/segments/000000.parquet"
    assert path.stat().st_size > 1 << 20
    for _ in range(2):
        assert [r.thumbnail for r in database.records([599, 0, 256])] == [thumbnails[i] for i in (599, 0, 256)]
    data = bytearray(path.read_bytes())
    place = data.index(thumbnails[300][:64])
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(DatabaseCorrupt, match="000000.parquet"):
        database.records([300])
