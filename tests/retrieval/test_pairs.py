"""A database as a collection of pairs: `db[id]`, `in`, iteration, and a table of all pairs."""

from __future__ import annotations

import csv
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from ragturbo import Database
from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.retrieval.export import export_table


@pytest.fixture
def database(plain, tmp_path) -> Database:
    """Ids 0 to 11 in segments of 5, without 3 and 7."""
    made = Database.build(plain.pairs(12), tmp_path / "db", encoder=plain.PixelEncoder(), segment_records=5)
    made.remove([3, 7])
    return made


def test_an_id_gives_its_pair(database, plain):
    pair = database[4]
    assert (pair.id, pair.caption, pair.source, pair.extra) == (4, "picture 0.4", "site-1", {"rank": 4})
    assert pair.image().size == plain.pairs(1)[0][1].size and database[np.int32(4)] == pair
    assert "thumbnail" not in repr(pair)


def test_an_id_that_is_absent_or_removed_is_a_key_error_in_words(database):
    for id, message in (
        (12, "pair 12 is not in the database .*10 pairs from id 0 to 11"),
        (3, "pair 3 was removed from the database"),
        (-1, "id -1 stands for a neighbour that was not found"),
    ):
        with pytest.raises(KeyError, match=message) as caught:
            database[id]
        assert isinstance(caught.value, InvalidRequest) and str(caught.value).startswith("pair")
    for wrong in (slice(0, 3), [1, 2], "1", np.array([1])):
        with pytest.raises(InvalidRequest, match=r"one id gives one pair; db.records\(ids\) gives many"):
            database[wrong]
    for wrong in (1.5, None, -2):
        with pytest.raises(InvalidRequest, match=f"id={wrong} must be a whole number of at least -1"):
            database[wrong]
    with pytest.raises(KeyError, match=f"pair {2**80} is not in"):
        database[2**80]
    for where, message in (
        ("source=a", "must be {column: value or list of values}"),
        ({"source": [{}]}, r"where: \[{}\] is no value of a column"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            database.remove(where=where)


def test_iteration_gives_every_live_pair_in_the_order_of_ids(database):
    live = [0, 1, 2, 4, 5, 6, 8, 9, 10, 11]
    assert [pair.id for pair in database] == live == database.ids.tolist() and len(database) == 10
    assert list(database) == [database[id] for id in live]
    assert [id for id in range(-1, 14) if id in database] == live
    assert np.int64(4) in database and "4" not in database and True not in database and 2**80 not in database


def test_the_message_about_an_unknown_id_has_the_right_number(database):
    with pytest.raises(InvalidRequest, match="id 99 is not in this database; nothing was removed"):
        database.remove([99, 1])
    with pytest.raises(InvalidRequest, match="ids 90, 91, 92, 93, 94, … are not in this database"):
        database.remove(range(90, 99))
    assert len(database) == 10


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_an_exported_table_has_every_pair_and_its_columns(kind, database, tmp_path):
    out = tmp_path / f"out.{kind}"
    assert export_table(database, out, tmp_path / "thumbs") == 10
    if kind == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    elif kind == "csv":
        rows = list(csv.DictReader(open(out, newline="")))
    else:
        rows = pq.read_table(out).to_pylist()
    assert [int(row["id"]) for row in rows] == database.ids.tolist()
    for row, pair in zip(rows, database, strict=True):
        assert (row["caption"], row["source"], row["sha256"]) == (pair.caption, pair.source, pair.sha256)
        assert int(row["rank"]) == pair.extra["rank"]
        assert (tmp_path / f"thumbs/{pair.id}.webp").read_bytes() == pair.thumbnail
    with pytest.raises(InvalidRequest, match="exists already"):
        export_table(database, out)
    with pytest.raises(InvalidRequest, match="must end in .jsonl, .csv, .parquet"):
        export_table(database, tmp_path / "out.txt")
    for wrong, message in (
        ((tmp_path / "nowhere" / out.name,), "nowhere does not exist; make it first"),
        ((database.path / out.name,), "is in the folder of the database"),
        ((tmp_path / f"b.{kind}", database.path / "thumbs"), "is in the folder of the database"),
        ((tmp_path / f"b.{kind}", out), "is a file, and thumbnails need a folder"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            export_table(database, *wrong)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_a_database_can_be_built_from_an_exported_table_and_the_images(kind, plain, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for i, (caption, picture, _) in enumerate(plain.pairs(5)):
        picture.save(images / f"{i}.png")
        (images / f"{i}.txt").write_text(f"{caption}, “quoted”\nover two lines")
    first = Database.build(images, tmp_path / "first", encoder=plain.PixelEncoder())
    export_table(first, out := tmp_path / f"out.{kind}")
    again = Database.build(out, tmp_path / "again", encoder=plain.PixelEncoder(), image="source", image_root=images)
    assert [(p.caption, p.source, p.sha256) for p in again] == [(p.caption, p.source, p.sha256) for p in first]


def test_a_folder_that_is_no_database_is_named_with_what_to_do(plain, tiny_sd21, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "unfinished/segments").mkdir(parents=True)
    for name, message in (
        ("nothing", "there is no such folder. `ragturbo db build"),
        ("file", "it is a file, and a database is a folder"),
        ("photos", "it has no CURRENT. `ragturbo db build .*photos --out"),
        ("unfinished", "its first build is unfinished .no CURRENT.. Run the same build again"),
    ):
        with pytest.raises(DatabaseError, match=f"{name}: not a ragturbo database: {message}"):
            Database.open(tmp_path / name)
    for wrong in (None, 3, "", object()):
        with pytest.raises(InvalidRequest, match="must be the name of a database's folder"):
            Database.open(wrong)


def test_another_encoder_is_described_in_words(database, plain):
    other = plain.PixelEncoder()
    other.fingerprints = {"text_encoder": "letters", "unet": "0" * 64}
    other.key_dim = 16
    with pytest.raises(DatabaseError) as caught:
        database.append(plain.pairs(1), encoder=other)
    message = str(caught.value)
    assert "was built with unet blocks, 4 × 4 × 48 features in float16 with keys of 32 values" in message
    assert "this encoder has unet 00000000, " in message and "{" not in message and "Geometry" not in message


def test_an_export_that_fails_leaves_no_file(database, tmp_path, monkeypatch):
    from ragturbo.retrieval import export

    def full(path, records, columns):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(export._WRITERS, ".csv", full)
    with pytest.raises(DatabaseError, match="No space left"):
        export_table(database, tmp_path / "out.csv")
    assert not list(tmp_path.glob("*out.csv*"))


def test_the_report_is_that_of_the_generation_in_use(plain, tmp_path):
    encoder = plain.PixelEncoder()
    first = Database.build(plain.pairs(3), tmp_path / "db", encoder=encoder)
    Database.open(tmp_path / "db").append(plain.pairs(2, 1), encoder=encoder)
    assert first.report.pairs == 3 and first.refresh() and first.report.pairs == 2
