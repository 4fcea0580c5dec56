"""Building from every kind of input, with a real (tiny) model: what is stored, skipped, resumed and shared."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ragturbo import Database
from ragturbo.errors import DatabaseError, DatabaseMismatch, InvalidRequest
from ragturbo.model.bundle import Bundle
from ragturbo.retrieval import ranks
from ragturbo.retrieval.build import append, build
from ragturbo.retrieval.encoder import BundleEncoder
from ragturbo.retrieval.images import square

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="module")
def encoder(tiny_sd21: Path) -> BundleEncoder:
    torch.set_num_threads(1)
    return BundleEncoder(Bundle.load(tiny_sd21, device="cpu", dtype=torch.float32))


def picture(i: int) -> Image.Image:
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 7, 30 + i % 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    picture(i).save(buffer, "PNG")
    return buffer.getvalue()


def caption(i: int) -> str:
    return f"a {COLOURS[i % 4]} circle number {i}"


def pairs(n: int) -> list[tuple[str, Image.Image, dict]]:
    return [(caption(i), picture(i), {"source": f"web/{i}", "licence": "cc0" if i % 2 else None}) for i in range(n)]


def test_a_built_pair_holds_what_the_encoder_says_of_it(encoder, tmp_path):
    report = build(pairs(5), tmp_path / "db", encoder=encoder, batch_size=4)
    database = Database.open(tmp_path / "db")
    assert (report.pairs, len(database), report.skipped) == (5, 5, [])
    pixels = np.stack([square(picture(i), encoder.size) for i in range(4)])
    keys, features = encoder.encode(pixels, [caption(i) for i in range(4)])
    np.testing.assert_allclose(database.keys(range(4)).numpy(), keys, atol=1e-3)
    np.testing.assert_array_equal(database.features(range(4)).numpy(), features.astype(np.float16))
    record = database.records([3])[0]
    assert (record.caption, record.source, record.extra) == (caption(3), "web/3", {"licence": "cc0"})
    assert max(Image.open(io.BytesIO(record.thumbnail)).size) <= 128
    ids, scores = database.search(keys, k=1)
    assert ids[:, 0].tolist() == [0, 1, 2, 3] and (scores > 0.999).all()


def write_inputs(folder: Path, kind: str, n: int) -> tuple[Path, dict]:
    """The same pairs in each of the formats a build takes."""
    images = folder / "img"
    images.mkdir()
    for i in range(n):
        (images / f"{i:03d}.png").write_bytes(png(i))
        if kind == "folder":
            (images / f"{i:03d}.txt").write_text(caption(i) + "\n")
    rows = [{"image": f"img/{i:03d}.png", "caption": caption(i), "topic": "test"} for i in range(n)]
    if kind == "folder":
        return images, {}
    if kind == "jsonl":
        (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder / "list.jsonl", {}
    if kind == "csv":
        with open(folder / "list.csv", "w", newline="") as file:
            out = csv.DictWriter(file, ["text", "url", "topic"])
            out.writeheader()
            out.writerows(
                {"text": r["caption"], "url": f"https://x.org/a/{r['image'][4:]}?s=1", "topic": "t"} for r in rows
            )
        return folder / "list.csv", {"caption": "text", "image": "img/{url:name}"}
    if kind == "parquet":
        table = [{"caption": r["caption"], "image": {"bytes": png(i), "path": r["image"]}} for i, r in enumerate(rows)]
        pq.write_table(pa.Table.from_pylist(table), folder / "list.parquet")
        return folder / "list.parquet", {}
    half = n // 2
    for shard, members in enumerate((range(half), range(half, n))):
        with tarfile.open(folder / f"{shard:02d}.tar", "w") as tar:
            for i in members:
                for name, data in ((f"a/{i:03d}.png", png(i)), (f"a/{i:03d}.txt", caption(i).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return folder / "*.tar", {}


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv", "parquet", "tar"])
def test_every_kind_of_input_gives_the_same_features(kind, encoder, tmp_path):
    source, options = write_inputs(tmp_path, kind, 6)
    build(source, tmp_path / "db", encoder=encoder, batch_size=4, **options)
    build([(caption(i), png(i)) for i in range(6)], tmp_path / "plain", encoder=encoder, batch_size=4)
    database, plain = Database.open(tmp_path / "db"), Database.open(tmp_path / "plain")
    assert [r.caption for r in database.records(range(6))] == [caption(i) for i in range(6)]
    assert [r.sha256 for r in database.records(range(6))] == [r.sha256 for r in plain.records(range(6))]
    np.testing.assert_array_equal(database.rows(range(6)), plain.rows(range(6)))
    assert all(record.source for record in database.records(range(6)))


def test_bad_items_are_skipped_and_listed_and_the_others_keep_their_ids(encoder, tmp_path):
    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png_claiming(60000, 60000))
    entries = [
        (caption(0), picture(0)),
        ("", picture(1)),
        (caption(2), b"not an image"),
        ("x" * 10_000_000, picture(3)),
        (caption(4), bomb),
        ("bad \ud800 text", picture(5)),
        (caption(6), tmp_path / "missing.png"),
        "nonsense",
        (caption(8), picture(8)),
    ]
    report = build(entries, tmp_path / "db", encoder=encoder, batch_size=4)
    database = Database.open(tmp_path / "db")
    assert database.ids.tolist() == [0, 8]
    reasons = {entry["item"]: entry["reason"] for entry in report.skipped}
    assert sorted(reasons) == [1, 2, 3, 4, 5, 6, 7]
    assert "empty" in reasons[1] and "cannot be read" in reasons[2] and "10000000 characters" in reasons[3]
    assert "pixels" in reasons[4] and "Unicode" in reasons[5] and "No such file" in reasons[6]
    assert json.loads((tmp_path / "db" / "build-report.json").read_text())["skipped"] == report.skipped
    with pytest.raises(InvalidRequest, match="item 1 .*empty"):
        build(entries, tmp_path / "strict", encoder=encoder, batch_size=4, strict=True)
    with pytest.raises(DatabaseError, match="not a ragturbo database"):
        Database.open(tmp_path / "strict")


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of one row whose header says it is enormous."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def test_names_in_tar_files_and_tables_cannot_leave_their_folder(encoder, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    inside = tmp_path / "in"
    inside.mkdir()
    with tarfile.open(inside / "x.tar", "w") as tar:
        for name, data in (("../../evil.png", png(2)), ("../../evil.txt", b"a red square")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
            link = tarfile.TarInfo("a/link.png")
            link.type, link.linkname = kind, str(secret)
            tar.addfile(link)
    build(inside / "x.tar", tmp_path / "db", encoder=encoder)
    assert len(Database.open(tmp_path / "db")) == 1
    assert not [p for p in tmp_path.parent.rglob("evil*") if p.is_file()]
    rows = [{"caption": "a", "image": "../secret.png"}, {"caption": "b", "image": str(secret)}]
    (inside / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InvalidRequest, match="leaves .* image_root"):
        build(inside / "list.jsonl", tmp_path / "db2", encoder=encoder)


def test_damaged_tables_and_shards_are_reported_and_the_rest_is_built(encoder, tmp_path):
    lines = [json.dumps({"caption": caption(0), "image": "0.png"}), "{broken", "[1, 2]", json.dumps({"caption": "x"})]
    (tmp_path / "0.png").write_bytes(png(0))
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    report = build(tmp_path / "list.jsonl", tmp_path / "db", encoder=encoder)
    assert report.pairs == 1
    reasons = [entry["reason"] for entry in report.skipped]
    assert ["not JSON" in reasons[0], "not an object" in reasons[1], "no column" in reasons[2]] == [True] * 3


class Interrupted(BundleEncoder):
    """The real encoder, until the moment the machine fails."""

    def __init__(self, encoder: BundleEncoder, batches: int) -> None:
        self.__dict__.update(encoder.__dict__)
        self.left = batches

    def encode(self, images, captions):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return super().encode(images, captions)


@pytest.mark.parametrize("batches", range(0, 6))
def test_an_interrupted_build_resumes_with_the_same_bytes(batches, encoder, plain, tmp_path):
    """22 pairs, segments of 8, batches of 4: two batches, then a short one, per segment."""
    data = pairs(22)
    data[9] = ("", data[9][1])
    options = {"batch_size": 4, "segment_records": 8}
    build(data, tmp_path / "whole", encoder=encoder, **options)
    with pytest.raises(KeyboardInterrupt):
        build(data, tmp_path / "db", encoder=Interrupted(encoder, batches), **options)
    resumed = Interrupted(encoder, 100)
    build(data, tmp_path / "db", encoder=resumed, **options)
    assert plain.tree(tmp_path / "db") == plain.tree(tmp_path / "whole")
    # Segments that were whole are not encoded again: of 6 batches, 2 a segment.
    assert 100 - resumed.left == 6 - 2 * (batches // 2)


def test_a_build_does_not_resume_over_another_input(encoder, tmp_path):
    options = {"batch_size": 4, "segment_records": 8}
    with pytest.raises(KeyboardInterrupt):
        build(pairs(20), tmp_path / "db", encoder=Interrupted(encoder, 3), **options)
    with pytest.raises(DatabaseError, match="input differs .* resume=False"):
        build(list(reversed(pairs(20))), tmp_path / "db", encoder=encoder, **options)
    with pytest.raises(DatabaseError, match="unfinished build .* resume=False"):
        build(pairs(20), tmp_path / "db", encoder=encoder, batch_size=8, segment_records=8)
    build(list(reversed(pairs(20))), tmp_path / "db", encoder=encoder, resume=False, **options)
    assert Database.open(tmp_path / "db").records([0])[0].caption == caption(19)


def test_building_again_what_is_there_changes_nothing(encoder, plain, tmp_path):
    source, _ = write_inputs(tmp_path, "folder", 5)
    build(source, tmp_path / "db", encoder=encoder)
    before = plain.tree(tmp_path / "db")
    assert build(source, tmp_path / "db", encoder=encoder).pairs == 5
    assert plain.tree(tmp_path / "db") == before
    with pytest.raises(DatabaseError, match="holds a database already"):
        build(pairs(3), tmp_path / "db", encoder=encoder)


def test_append_gives_new_ids_and_refuses_another_encoder(encoder, tmp_path):
    build(pairs(3), tmp_path / "db", encoder=encoder, batch_size=4)
    report = append(pairs(2), tmp_path / "db", encoder=encoder, batch_size=4)
    database = Database.open(tmp_path / "db")
    assert (report.pairs, database.ids.tolist()) == (2, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(database.rows([3, 4]), database.rows([0, 1]))
    other = Interrupted(encoder, 9)
    other.fingerprints = {**encoder.fingerprints, "unet": "0" * 64}
    with pytest.raises(DatabaseMismatch, match="was built with .* this encoder has"):
        append(pairs(2), tmp_path / "db", encoder=other)


def test_an_append_keeps_what_another_process_committed_before_it_got_the_lock(encoder, tmp_path, monkeypatch):
    build(pairs(3), tmp_path / "db", encoder=encoder)
    current = ranks.current

    def after_another_append() -> ranks.Rank:
        # Called after the manifest was read and before the lock is taken.
        monkeypatch.setattr(ranks, "current", current)
        append([("a cat", picture(7))], tmp_path / "db", encoder=encoder)
        return current()

    monkeypatch.setattr(ranks, "current", after_another_append)
    report = append([("a dog", picture(8)), ("a boat", picture(9))], tmp_path / "db", encoder=encoder)
    database = Database.open(tmp_path / "db")
    assert [r.caption for r in database.records(database.ids)][3:] == ["a cat", "a dog", "a boat"]
    assert report.ids == [4, 5]


def test_a_report_names_the_ids_of_the_stored_pairs(encoder, tmp_path):
    build(pairs(3), tmp_path / "db", encoder=encoder)
    report = append([("a cat", picture(7)), ("", picture(8)), ("a dog", picture(9))], tmp_path / "db", encoder=encoder)
    assert report.ids == [3, 5] == Database.open(tmp_path / "db").ids[3:].tolist()


def test_an_append_that_was_committed_is_not_done_twice(encoder, tmp_path):
    source, _ = write_inputs(tmp_path, "folder", 4)
    build(pairs(3), tmp_path / "db", encoder=encoder)
    append(source, tmp_path / "db", encoder=encoder)
    append(source, tmp_path / "db", encoder=encoder)
    assert len(Database.open(tmp_path / "db")) == 7


RANK = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from plain import PixelEncoder, build
build({source!r}, {target!r}, encoder=PixelEncoder(), batch_size=4, segment_records=8, index=False)
"""


def test_three_processes_build_the_same_bytes_as_one(plain, tmp_path):
    source, _ = write_inputs(tmp_path, "folder", 52)
    build(source, tmp_path / "one", encoder=plain.PixelEncoder(), batch_size=4, segment_records=8, index=False)
    code = RANK.format(here=str(Path(__file__).parent), source=str(source), target=str(tmp_path / "db"))
    env = {**os.environ, "WORLD_SIZE": "3"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(r)}) for r in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert plain.tree(tmp_path / "db") == plain.tree(tmp_path / "one")
