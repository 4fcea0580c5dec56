"""What a build or an append says: what it skipped and why, what it noted, and how many pairs there are."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ragturbo import Database
from ragturbo.errors import InvalidRequest, UnknownOption
from ragturbo.retrieval.build import append, build
from ragturbo.retrieval.export import export_table
from ragturbo.retrieval.report import BuildReport, Notes


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def put(folder: Path, name: str, image: bytes, caption: str | bytes | None = None) -> None:
    (folder / name).write_bytes(image)
    if caption is not None:
        data = caption if isinstance(caption, bytes) else caption.encode()
        (folder / name).with_suffix(".txt").write_bytes(data)


@pytest.fixture
def messy(tmp_path) -> Path:
    """Every trouble that a folder of pictures has."""
    folder = tmp_path / "photos"
    folder.mkdir()
    put(folder, "00-bom.png", png(0), b"\xef\xbb\xbfa blue square")
    put(folder, "01-utf16.png", png(1), "a green square".encode("utf-16"))
    put(folder, "02-latin1.png", png(2), b"caf\xe9")
    put(folder, "03-broken.png", png(3)[:200], "a broken one")
    put(folder, "04-zero.png", b"", "no bytes")
    put(folder, "05-text.png", b"hello", "not an image")
    put(folder, "06-two.jpg", png(6), "a red square")
    put(folder, "06-two.png", png(7))
    put(folder, "07-empty.png", png(8), " \n")
    put(folder, "08-none.png", png(9))
    put(folder, "09-first.png", png(10), "a yellow ring")
    put(folder, "10-again.png", png(10), "a yellow ring")
    put(folder, "11-other.png", png(10), "a ring")
    put(folder, "12-long.png", png(11), "long " * 100)
    put(folder, "13-zib.png", png(12), "a zib")
    put(folder, "14-café ünï.png", png(13), "a circle\r\nin the rain")
    (folder / "lonely.txt").write_text("no image")
    (folder / "README.md").write_text("about")
    (folder / ".DS_Store").write_bytes(b"x")
    os.symlink("..", folder / "loop")
    return folder


@pytest.fixture
def reader(plain):
    """An encoder whose tokenizer reads ten words and knows none that starts with z."""

    class Reader(plain.PixelEncoder):
        def unread(self, captions):
            split = [caption.split() for caption in captions]
            return [(max(0, len(s) - 10), tuple(word for word in s if word.startswith("z"))) for s in split]

    return Reader()


def test_a_build_says_what_it_skipped_and_why(messy, reader, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ragturbo"):
        database = Database.build(messy, tmp_path / "db", encoder=reader, batch_size=4)
    report = database.report
    reasons = {entry["source"]: entry["reason"] for entry in report.skipped}
    assert reasons == {
        "01-utf16.png": "no caption: 01-utf16.txt is UTF-16; save it as UTF-8",
        "02-latin1.png": "no caption: 02-latin1.txt is not UTF-8: byte 0xe9 at 3",
        "03-broken.png": reasons["03-broken.png"],
        "04-zero.png": "the image cannot be read: the file is empty",
        "05-text.png": "the image cannot be read: it is damaged or of no known format",
        "07-empty.png": "the caption is empty",
        "08-none.png": "no caption: there is no 08-none.txt",
    }
    assert reasons["03-broken.png"].startswith("the image cannot be read: ")
    assert (report.pairs, report.items, report.total, len(database)) == (9, 16, 9, 9)
    said = str(report)
    assert "9 pairs stored" in said and "7 of 16 items skipped" in said
    assert "7 skipped" in repr(database) and "9 pairs" in repr(database) and "16 px float16" in repr(database)
    assert "7 of 16 items skipped" in caplog.text and len(caplog.records) == 1
    # Another process reads the same report.
    assert Database.open(tmp_path / "db").report.skipped == report.skipped


def test_a_build_notes_what_it_stored_but_is_worth_knowing(messy, reader, tmp_path):
    report = build(messy, tmp_path / "db", encoder=reader, batch_size=4)
    assert {kind: entry["count"] for kind, entry in report.notes.items()} == {
        "duplicate": 1, "cut_off": 1, "unknown_words": 1, "shared_text": 1, "text_without_image": 1,
        "linked_folder": 1, "ignored_file": 1,
    }  # fmt: skip
    examples = {kind: entry["examples"][0] for kind, entry in report.notes.items()}
    assert examples["duplicate"] == "pair 11 (10-again.png) repeats pair 10"
    assert examples["cut_off"] == "item 13 (12-long.png): the last 90 tokens"
    assert examples["unknown_words"] == "item 14 (13-zib.png): zib"
    assert examples["shared_text"] == "06-two.txt of 06-two.jpg, 06-two.png"
    assert [examples[kind] for kind in ("text_without_image", "linked_folder", "ignored_file")] == [
        "lonely.txt", "loop", "README.md",
    ]  # fmt: skip
    assert "1 caption is longer than the text encoder reads: item 13" in str(report)
    assert json.loads((tmp_path / "db/build-report.json").read_text())["notes"] == report.notes


def test_an_encoder_without_a_tokenizer_gives_no_notes_of_captions(messy, plain, tmp_path):
    report = build(messy, tmp_path / "db", encoder=plain.PixelEncoder(), batch_size=4)
    assert not {"cut_off", "unknown_words"} & set(report.notes) and report.pairs == 9


def test_a_clean_build_says_nothing(plain, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "ragturbo"):
        database = Database.build(plain.pairs(3), tmp_path / "db", encoder=plain.PixelEncoder())
    assert database.report.lines() == [] and not caplog.records and "skipped" not in repr(database)


def test_a_byte_order_mark_is_not_stored(plain, tmp_path):
    images = tmp_path / "img"
    images.mkdir()
    put(images, "0.png", png(0), b"\xef\xbb\xbfa boat")
    row = b'{"caption": "a boat", "image": "img/0.png"}\n'
    (tmp_path / "list.jsonl").write_bytes(b"\xef\xbb\xbf" + row)
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbfcaption,image\r\na boat,img/0.png\r\n")
    for source in (images, tmp_path / "list.jsonl", tmp_path / "list.csv"):
        folder = tmp_path / f"db-{source.name}"
        build(source, folder, encoder=plain.PixelEncoder())
        assert Database.open(folder)[0].caption == "a boat"
    (tmp_path / "wide.csv").write_bytes("caption,image\n".encode("utf-16"))
    with pytest.raises(InvalidRequest, match="wide.csv is UTF-16; save it as UTF-8"):
        build(tmp_path / "wide.csv", tmp_path / "db", encoder=plain.PixelEncoder())


def test_lines_of_a_caption_file_are_read_as_before(messy, plain, tmp_path):
    build(messy, tmp_path / "db", encoder=plain.PixelEncoder(), batch_size=4)
    assert [r.caption for r in Database.open(tmp_path / "db") if "ünï" in r.source] == ["a circle\nin the rain"]


def test_empty_and_long_rows_of_a_table_are_noted(plain, tmp_path):
    put(tmp_path, "0.png", png(0))
    (tmp_path / "list.csv").write_text("caption,image\n\na boat,0.png\na cat,0.png,too much\n\n")
    report = build(tmp_path / "list.csv", tmp_path / "db", encoder=plain.PixelEncoder())
    assert report.notes["empty_row"]["count"] == 2 and report.pairs == 2
    assert report.notes["long_row"]["examples"] == ["list.csv:4 has 3 fields instead of 2"]
    (tmp_path / "list.csv").write_text("caption,image\na cat, sitting,0.png\n")
    with pytest.raises(InvalidRequest, match="3 fields instead of 2: a caption with a comma needs quotes"):
        build(tmp_path / "list.csv", tmp_path / "db2", encoder=plain.PixelEncoder())


class Interrupted:
    """An encoder that fails after some batches, as a machine does."""

    def __init__(self, encoder, batches: int) -> None:
        self.encoder, self.left = encoder, batches

    def __getattr__(self, name):
        return getattr(self.encoder, name)

    def encode(self, images, captions):
        if self.left == 0:
            raise KeyboardInterrupt
        self.left -= 1
        return self.encoder.encode(images, captions)


@pytest.mark.parametrize("dedupe", [False, True])
@pytest.mark.parametrize("batches", range(4))
def test_a_resumed_build_writes_the_same_report(batches, dedupe, messy, reader, plain, tmp_path):
    options = {"batch_size": 2, "segment_records": 4, "dedupe": dedupe}
    build(messy, tmp_path / "whole", encoder=reader, **options)
    with pytest.raises(KeyboardInterrupt):
        build(messy, tmp_path / "db", encoder=Interrupted(reader, batches), **options)
    report = build(messy, tmp_path / "db", encoder=reader, **options)
    assert plain.tree(tmp_path / "db") == plain.tree(tmp_path / "whole")
    assert report.pairs == (8 if dedupe else 9) and ("duplicate" in report.notes) != dedupe


RANK = """
import sys
sys.path.insert(0, {here!r})
from plain import PixelEncoder, build
build({source!r}, {target!r}, encoder=PixelEncoder(), batch_size=4, segment_records=4, dedupe={dedupe})
"""


def test_three_processes_write_the_same_report_as_one(messy, plain, tmp_path):
    build(messy, tmp_path / "one", encoder=plain.PixelEncoder(), batch_size=4, segment_records=4)
    here = str(Path(__file__).parent)
    code = RANK.format(here=here, source=str(messy), target=str(tmp_path / "db"), dedupe=False)
    env = {**os.environ, "WORLD_SIZE": "3"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env={**env, "RANK": str(r)}) for r in range(3)]
    assert [run.wait(120) for run in runs] == [0, 0, 0]
    assert plain.tree(tmp_path / "db") == plain.tree(tmp_path / "one")


def test_dedupe_by_several_processes_is_refused(messy, plain, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InvalidRequest, match="dedupe needs a single process"):
        build(messy, tmp_path / "db", encoder=plain.PixelEncoder(), dedupe=True)
    assert not (tmp_path / "db").exists()


def test_an_append_says_what_is_a_duplicate_and_dedupe_skips_it(plain, tmp_path):
    encoder, data = plain.PixelEncoder(), plain.pairs(4)
    database = Database.build(data, tmp_path / "db", encoder=encoder)
    report = database.append(data[1:3], encoder=encoder)
    assert (report.pairs, report.total, report.notes["duplicate"]["count"]) == (2, 6, 2)
    database.remove([1, 4])
    report = database.append([*data, ("new", data[0][1]), ("new", data[0][1])], encoder=encoder, dedupe=True)
    # Pair 1 was removed and is no original any more; another caption of the same image is no duplicate.
    assert report.ids == [7, 10] and report.total == 6 and database.report is report
    assert [entry["reason"] for entry in report.skipped] == [
        "a duplicate of pair 0", "a duplicate of pair 2", "a duplicate of pair 3", "a duplicate of pair 10",
    ]  # fmt: skip
    # Nothing new is no error, and changes nothing.
    before = database.snapshot.manifest.generation
    report = database.append(data[:1], encoder=encoder, dedupe=True)
    assert (report.pairs, report.ids, report.total) == (0, [], 6)
    assert database.snapshot.manifest.generation == before


def test_an_append_that_was_done_before_says_that_nothing_was_added(plain, tmp_path, caplog):
    encoder = plain.PixelEncoder()
    for i in range(3):
        put(tmp_path, f"{i}.png", png(i))
    (tmp_path / "list.csv").write_text("caption,image\n" + "".join(f"pair {i},{i}.png\n" for i in range(3)))
    database = Database.build(plain.pairs(2), tmp_path / "db", encoder=encoder)
    assert not database.append(tmp_path / "list.csv", encoder=encoder).already
    report = database.append(tmp_path / "list.csv", encoder=encoder)
    assert report.already and len(database) == report.total == 5 and "nothing was added" in caplog.text


@pytest.mark.parametrize("segment_records", [4, 100])
def test_the_progress_ends_at_the_true_counts(segment_records, messy, plain, tmp_path):
    seen = []
    options = {"batch_size": 4, "segment_records": segment_records, "on_progress": lambda *now: seen.append(now)}
    build(messy, tmp_path / "db", encoder=plain.PixelEncoder(), **options)
    assert seen[-1] == (16, 16, 7) and seen[0] == (0, 16, 0)
    assert all(a[2] <= b[2] for a, b in zip(seen, seen[1:], strict=False))
    # A table's length is not known before it is read.
    put(tmp_path, "0.png", png(0))
    (tmp_path / "list.csv").write_text("caption,image\na boat,0.png\n")
    build(
        tmp_path / "list.csv", tmp_path / "db2", encoder=plain.PixelEncoder(), on_progress=lambda *now: seen.append(now)
    )
    assert seen[-1] == (1, 1, 0)


def test_an_input_of_which_nothing_can_be_stored_is_an_error_before_the_model_is_loaded(tmp_path):
    (tmp_path / "photos").mkdir()
    put(tmp_path / "photos", "0.png", png(0))
    (tmp_path / "list.csv").write_text("text,url\na boat,0.png\n")
    (tmp_path / "gone.jsonl").write_text('{"caption": "a boat", "image": "gone.png"}\n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "x.tar").write_bytes(b"")
    pq.write_table(pa.table({"text": ["a boat"], "image": ["0.png"]}), tmp_path / "list.parquet")
    for source, message in (
        (
            tmp_path / "photos",
            r"none of 1 item can be stored; the first: item 0 \(0.png\): no caption: there is no 0.txt",
        ),
        (tmp_path / "list.csv", "no column 'image'; there are text, url .caption= and image= name the columns"),
        (tmp_path / "list.parquet", "no column 'caption'; there are text, image"),
        (tmp_path / "gone.jsonl", "the image cannot be read: .*gone.png: No such file"),
        (tmp_path / "empty.jsonl", "the input has no pairs"),
        ("", "the name of the input is empty"),
        ([tmp_path / "photos", tmp_path / "list.csv"], "give one folder, or files of one kind: .*photos is a folder"),
        ([tmp_path / "list.csv", tmp_path / "x.tar"], "one kind, not .csv and .tar"),
        (tmp_path / "photos/0.png", "an image file needs a caption: .* only `ragturbo db append` takes image files"),
        ([], "the input has no pairs"),
        ({"a boat": "0.png"}, "neither a path nor an iterable"),
        (None, "pairs=None is neither a path"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            build(source, tmp_path / "db", model="shapes", on_load=lambda: pytest.fail("the model was loaded"))
    assert not (tmp_path / "db").exists()


def test_an_invalid_option_is_an_error_before_the_model_is_loaded(messy, tmp_path):
    for options, message in (
        ({"feature_dtype": "float15"}, "feature_dtype='float15' is not one of 'float16', 'int8'; did you mean"),
        ({"key": "clipp"}, "key='clipp' is not one of"),
        ({"dtype": "half"}, "dtype='half' is not one of"),
        ({"device": "gpu"}, "device='gpu' is not cpu"),
        ({"batch_size": 0}, "batch_size=0 must be a whole number from 1 to 1024"),
        ({"batch_size": 100_000}, "batch_size=100000 must be a whole number from 1 to 1024"),
        ({"size": 100_000}, "size=100000 must be a whole number from 1 to 8192"),
        ({"encoder": 3}, "encoder=3 has no encode"),
        ({"strict": "yes"}, "strict='yes' must be True or False"),
        ({"index": 1}, "index=1 must be True or False"),
        ({"caption": 3}, "caption=3 must be the name of a column"),
        ({"columns": "foo"}, "columns='foo' must be a list of names"),
        ({"columns": ["foo"]}, r"the choice of columns \(foo\) has no effect on a folder of images"),
        ({"image": "url"}, "image='url' has no effect on a folder of images"),
        ({"image_root": 3}, "image_root=3 is no folder"),
        ({"batch_size": 2.5}, "batch_size=2.5 must be"),
        ({"workers": -1}, "workers=-1 must be"),
        ({"size": "big"}, "size='big' must be"),
        ({"segment_records": 0}, "segment_records=0 must be"),
        ({"image_root": "nowhere"}, "image_root='nowhere' is no folder"),
        ({"model": None}, "give model="),
    ):
        with pytest.raises(InvalidRequest, match=message):
            build(
                messy, tmp_path / "db", **{"model": "shapes", **options},
                on_load=lambda: pytest.fail("the model was loaded"),
            )  # fmt: skip
    with pytest.raises(UnknownOption, match="no argument 'batchsize'; did you mean batch_size"):
        Database.build(messy, tmp_path / "db", model="shapes", batchsize=3)
    with pytest.raises(TypeError, match="strickt"):
        Database.append(None, messy, strickt=True)
    assert not (tmp_path / "db").exists()


def test_numbers_of_numpy_are_numbers(messy, plain, tmp_path):
    options = {"batch_size": np.int64(4), "segment_records": np.int32(8), "workers": np.int64(2)}
    database = Database.build(messy, tmp_path / "db", encoder=plain.PixelEncoder(), **options)
    build(messy, tmp_path / "plain", encoder=plain.PixelEncoder(), batch_size=4, segment_records=8)
    assert plain.tree(tmp_path / "db") == plain.tree(tmp_path / "plain")
    keys = database.keys(database.ids[:2]).numpy()
    expected = database.search(keys, 3, min_score=0.1, diversity=0.5, max_similarity=0.99)
    found = database.search(
        keys, np.int64(3), min_score=np.float32(0.1), diversity=np.float64(0.5), max_similarity=np.float64(0.99)
    )
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)
    assert database.search(keys, k=np.int64(100))[0].shape == (2, 100)
    assert database[np.int64(database.ids[0])].id in database and database.remove(np.int64(database.ids[0])) == 1
    with pytest.raises(InvalidRequest, match="min_score='high' must be a number"):
        database.search(keys, min_score="high")


def test_a_table_that_would_be_read_wrongly_is_refused(plain, tmp_path):
    put(tmp_path, "0.png", png(0))
    for name, table, options, message in (
        ("twice.csv", "caption,image,caption\na,0.png,b\n", {}, "the header names 'caption' twice"),
        ("semi.csv", "caption;image\na;0.png\n", {}, "separated by semicolons; save it with commas"),
        ("tab.csv", "caption\timage\na\t0.png\n", {}, "separated by tabs"),
        ("a.csv", "caption,image\na,0.png\n", {"columns": ["nope"]}, "no column 'nope' to keep; there are caption, im"),
        ("a.jsonl", '{"caption": "a", "image": "0.png"}\n', {"columns": ["nope"]}, "there are caption, image"),
        ("b.csv", "caption,image,id\na,0.png,x\n", {"columns": ["id"]}, "'id' cannot be kept"),
    ):
        (tmp_path / name).write_text(table)
        with pytest.raises(InvalidRequest, match=message):
            build(tmp_path / name, tmp_path / "db", encoder=plain.PixelEncoder(), **options)
    # A column may first occur in any row.
    rows = [{"caption": f"pair {i}", "image": "0.png"} for i in range(150)] + [
        {"caption": "a", "image": "0.png", "x": 1}
    ]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(tmp_path / "late.jsonl", tmp_path / "db", encoder=plain.PixelEncoder(), columns=np.array(["x"]))
    assert Database.open(tmp_path / "db")[150].extra == {"x": 1}


def test_a_cell_that_names_no_image_is_skipped_in_words(plain, tmp_path):
    put(tmp_path, "0.png", png(0))
    rows = [("a", "0.png"), ("b", ""), ("c", "https://x.y/a.png"), ("d", "."), ("e\0", "0.png")]
    (tmp_path / "list.csv").write_text("caption,image\n" + "".join(f"{a},{b}\n" for a, b in rows[:4]))
    report = build(tmp_path / "list.csv", tmp_path / "table", encoder=plain.PixelEncoder())
    assert [entry["reason"] for entry in report.skipped] == [
        "the image is empty", "the image 'https://x.y/a.png' is a URL: download the images first",
        f"the image cannot be read: {tmp_path}: it is a folder",
    ]  # fmt: skip
    entries = [(caption, str(tmp_path / image) if image == "0.png" else image) for caption, image in rows]
    reasons = [entry["reason"] for entry in build(entries, tmp_path / "db", encoder=plain.PixelEncoder()).skipped]
    assert reasons[:2] == [entry["reason"] for entry in report.skipped[:2]]
    assert reasons[3] == "the caption has a NUL character"


def test_a_column_that_cannot_be_stored_is_noted_but_not_those_of_an_exported_table(plain, tmp_path):
    put(tmp_path, "0.png", png(0))
    (tmp_path / "own.csv").write_text("caption,image,id\na,0.png,x\nb,0.png,y\n")
    own = Database.build(tmp_path / "own.csv", tmp_path / "own", encoder=plain.PixelEncoder())
    assert own.report.notes["own_name"] == {"count": 1, "examples": ["id"]}
    export_table(own, tmp_path / "out.csv")
    build(tmp_path / "out.csv", tmp_path / "again", encoder=plain.PixelEncoder(), image="source")
    assert "own_name" not in BuildReport.read(tmp_path / "again").notes


def test_skipped_items_are_grouped_by_reason_without_names_and_numbers():
    reasons = [
        ("a.png", "no caption: there is no a.txt"), ("b c.png", "no caption: b c.txt is UTF-16; save it as UTF-8"),
        ("d.png", "no caption: there is no d.txt"), ("x/e.png", "no caption: e.txt is UTF-16; save it as UTF-8"),
        (None, "the image cannot be read: /a b/f.png: No such file"),
        (None, "the image cannot be read: /g.png: No such file"),
        (None, "the caption is empty"), (None, "the caption is empty"),
    ]  # fmt: skip
    skipped = [{"item": i, "source": source, "reason": reason} for i, (source, reason) in enumerate(reasons)]
    assert BuildReport("db", 1, 1, skipped).lines()[1:-1] == [
        "  2 × no caption: there is no …; the first is item 0 (a.png): no caption: there is no a.txt",
        "  2 × no caption: … is UTF-16; save it as UTF-8; the first is item 1 (b c.png): no caption: b c.txt is "
        "UTF-16; save it as UTF-8",
        "  2 × the image cannot be read: …: No such file; the first is item 4: the image cannot be read: /a b/f.png: "
        "No such file",
        "  2 × the caption is empty; the first is item 6",
    ]


def test_no_address_in_memory_reaches_a_report(plain, tmp_path):
    class Odd(io.BytesIO):
        pass

    entries = [("a", png(0)), ("b", Odd(b"x")), ("c", b"not an image"), ("d", png(1)[:150])]
    build(entries, tmp_path / "db", encoder=plain.PixelEncoder())
    raw = (tmp_path / "db/build-report.json").read_text()
    assert "0x" not in raw and "BytesIO object" not in raw and len(BuildReport.read(tmp_path / "db").skipped) == 3


def test_notes_keep_the_first_examples_of_all_parts():
    parts = [Notes() for _ in range(3)]
    for i in range(9):
        parts[i // 3].add("empty_row", f"row {i}")
    whole = Notes()
    for part in parts:
        whole.merge(part.to_dict())
    assert whole.to_dict() == {"empty_row": {"count": 9, "examples": [f"row {i}" for i in range(5)]}}


def test_an_old_report_is_still_read(plain, tmp_path):
    build(plain.pairs(3), tmp_path / "db", encoder=plain.PixelEncoder())
    old = {"first_id": 0, "generation": 1, "pairs": 3, "skipped": []}
    (tmp_path / "db/build-report.json").write_text(json.dumps(old))
    report = Database.open(tmp_path / "db").report
    assert (report.pairs, report.total, report.notes, report.model) == (3, 3, {}, None)
    (tmp_path / "db/build-report.json").write_text("[1]")
    assert Database.open(tmp_path / "db").report is None and "3 pairs" in repr(Database.open(tmp_path / "db"))
    append(plain.pairs(1, 5), tmp_path / "db", encoder=plain.PixelEncoder())


def test_a_corrected_input_is_built_where_one_could_not_be_stored(plain, tmp_path):
    for wrong, message in (
        ([("a boat", None)], "item 0: an image must be a PIL image, a path or bytes, not nothing"),
        ([("a boat", np.zeros((9, 9, 3), np.uint8))], "not an array; PIL.Image.fromarray makes one"),
        ([(plain.pairs(1)[0][1], "a boat")], r"the order is \(caption, image\), not \(an image, a text\)"),
        ([{"caption": "a boat"}], "not .caption, image. or .caption, image, metadata. but a dictionary"),
    ):
        with pytest.raises(InvalidRequest, match=message) as caught:
            build(wrong, tmp_path / "db", encoder=plain.PixelEncoder())
        assert str(caught.value).startswith("none of 1 item can be stored; the first: item 0")
    assert build(plain.pairs(2), tmp_path / "db", encoder=plain.PixelEncoder()).pairs == 2


@pytest.mark.parametrize("batch_size", [1, 4])
def test_a_copy_of_a_pair_that_cannot_be_stored_is_no_duplicate_of_it(batch_size, plain, tmp_path):
    class Infinite(plain.PixelEncoder):
        def encode(self, images, captions):
            keys, features = super().encode(images, captions)
            features[[caption == "bad" for caption in captions]] = np.inf
            return keys, features

    picture, good = plain.pairs(1)[0][1], plain.pairs(3)
    report = build(
        [("bad", picture), ("bad", picture), *good],
        tmp_path / "db",
        encoder=Infinite(),
        batch_size=batch_size,
        dedupe=True,
    )
    assert report.pairs == 3 and len(report.skipped) == 2
    assert all("finite" in entry["reason"] and "duplicate" not in entry["reason"] for entry in report.skipped)
    with pytest.raises(InvalidRequest, match="finite"):
        build([("bad", picture)] * 2, tmp_path / "none", encoder=Infinite(), batch_size=batch_size, dedupe=True)


def test_a_damaged_report_is_left_out_of_account(plain, tmp_path):
    Database.build(plain.pairs(2), tmp_path / "db", encoder=plain.PixelEncoder())
    path = tmp_path / "db" / "build-report.json"
    for change in ({"model": 5}, {"notes": {"duplicate": 3}}, {"notes": {"duplicate": {"count": "x", "examples": []}}}):
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        assert Database.open(tmp_path / "db").report is None
