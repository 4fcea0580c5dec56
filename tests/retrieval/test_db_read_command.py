"""`ragturbo db search|list|show|export|info`: what they print, and mistakes that are answered without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ragturbo import Database
from ragturbo.cli.db import app
from ragturbo.errors import DatabaseError, InvalidRequest


def text(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run(*arguments: object) -> dict:
    return json.loads(text(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def db(plain, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("read") / "db"
    Database.build(plain.pairs(6), folder, encoder=plain.PixelEncoder()).remove([2])
    return folder


@pytest.fixture(scope="module")
def model_db(plain, tiny_sd21, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("read") / "model-db"
    captions = ["a red circle", "a blue square", "a dog"]
    images = [image for _, image, _ in plain.pairs(3)]
    Database.build(zip(captions, images, strict=True), folder, model=tiny_sd21, device="cpu")
    return folder


def test_search_prints_id_score_caption_and_source(model_db, tiny_sd21):
    lines = text("search", model_db, "a blue square", "-k", 2).stdout.splitlines()
    assert len(lines) == 2 and lines[0] == "1  1.000  a blue square"
    found = run("search", model_db, "a dog", "a red circle", "-k", 1, "--model", tiny_sd21)["queries"]
    assert [query["hits"][0]["id"] for query in found] == [2, 0] and found[0]["text"] == "a dog"
    both = text("search", model_db, "a dog", "a red circle", "-k", 1).stdout.splitlines()
    assert both[0] == "a dog:" and both[2] == "a red circle:"
    assert text("search", model_db, "a dog", "--min-score", 1.5).stdout == "no pair was found\n"


def test_search_by_words_needs_no_model(db):
    [line] = text("search", db, "4", "picture 0.4", "--retriever", "bm25", "-k", 1).stdout.splitlines()[-1:]
    assert line.endswith("(site-0)")
    with pytest.raises(InvalidRequest, match="not known which model built"):
        text("search", db, "picture")


def test_a_word_that_the_model_does_not_know_is_said(tmp_path):
    said = text("search", "shapes", "a zib", "-k", 1)
    assert "'a zib': the model does not know zib; --retriever bm25 or hybrid finds words" in said.stderr


def test_list_prints_pairs_by_id_and_condition(db):
    said = text("list", db, "--limit", 2, "--offset", 1)
    assert said.stdout == "1  picture 0.1  (site-1)\n3  picture 0.3  (site-0)\n"
    assert said.stderr == "2 of 5 pairs; see --limit and --offset\n"
    found = run("list", db, "--where", "source=site-1", "--where", "rank=4")
    assert found["total"] == 1 and found["pairs"][0]["caption"] == "picture 0.4" and found["pairs"][0]["rank"] == 4
    assert text("list", db).stderr == ""
    with pytest.raises(InvalidRequest, match="no pair has a column 'colour'; columns: "):
        text("list", db, "--where", "colour=red")


def test_show_prints_a_pair_and_writes_its_thumbnail(db, plain, tmp_path):
    said = text("show", db, 4, "--image", tmp_path / "4.webp").stdout
    assert "caption          picture 0.4" in said and "rank             4" in said
    assert Image.open(tmp_path / "4.webp").size == plain.pairs(1)[0][1].size
    text("show", db, 4, "--image", tmp_path / "4.png")
    assert Image.open(tmp_path / "4.png").format == "PNG"
    assert [pair["id"] for pair in run("show", db, 0, 5)["pairs"]] == [0, 5]
    for arguments, message in (
        ([2], "pair 2 was removed from"),
        ([9], "pair 9 is not in .* 5 pairs from id 0 to 5"),
        ([0, 1, "--image", "x.webp"], "--image writes the thumbnail of one pair, and there are 2 ids"),
        ([0, "--image", tmp_path / "x.what"], "x.what must end in .webp, .png, .jpg"),
        ([0, "--image", tmp_path / "x.gif"], "x.gif must end in"),
        ([0, "--image", tmp_path], "is a folder; name a file in it"),
        ([0, "--image", tmp_path / "no/x.webp"], "no does not exist; make it first"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            text("show", db, *arguments)


def test_export_writes_a_table_and_thumbnails(db, tmp_path):
    said = text("export", db, tmp_path / "out.jsonl", "--thumbnails", tmp_path / "thumbs")
    assert said.stdout == f"5 pairs written to {tmp_path / 'out.jsonl'}\n"
    assert len(list((tmp_path / "thumbs").iterdir())) == len((tmp_path / "out.jsonl").read_text().splitlines()) == 5


def test_info_prints_no_dictionaries(db):
    said = text("info", db).stdout
    assert "encoder text_encoder  letters" in said and "{" not in said


def test_the_embedded_models_database_is_read_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("info", "shapes")["pairs"] == 4000
    assert text("list", "shapes", "--limit", 1).stderr == "1 of 4000 pairs; see --limit and --offset\n"


@pytest.mark.parametrize("arguments", [["remove", 1], ["compact"], ["reindex"], ["append", "a.png", "--caption", "x"]])
def test_the_embedded_models_database_is_not_changed_and_a_copy_is_named(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    with pytest.raises(InvalidRequest, match="cannot be changed; change a copy: `ragturbo db copy shapes my-db`"):
        text(command, "shapes", *rest)


def test_one_pair_is_called_one_pair(db, plain, tmp_path):
    Database.build(plain.pairs(2), tmp_path / "two", encoder=plain.PixelEncoder())
    assert text("remove", tmp_path / "two", 0).stdout == "removed 1 pair; 1 is left\n"
    assert text("verify", tmp_path / "two").stdout == f"{tmp_path / 'two'} is undamaged: 1 pair\n"
    assert text("copy", tmp_path / "two", tmp_path / "other").stdout == f"1 pair in {tmp_path / 'other'}\n"


def test_damage_is_described_without_the_names_of_classes(db, plain, tmp_path):
    Database.build(plain.pairs(2), tmp_path / "db", encoder=plain.PixelEncoder())
    with open(tmp_path / "db/segments/000000.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(DatabaseError):
        text("info", tmp_path / "db")
    data = bytearray((tmp_path / "db/segments/000000.keys").read_bytes())
    (tmp_path / "db/segments/000000.parquet").write_bytes((tmp_path / "db/segments/000000.parquet").read_bytes()[:-1])
    opened = Database.open(tmp_path / "db")
    data[0] ^= 1
    (tmp_path / "db/segments/000000.keys").write_bytes(data)
    with pytest.raises(DatabaseError, match="bytes with SHA-256 [0-9a-f]{12}…, the manifest says") as caught:
        opened.verify()
    assert "FileSum" not in str(caught.value)


MISTAKES = """
import json, sys
from typer.testing import CliRunner
from ragturbo.cli.db import app
for arguments in json.load(open(sys.argv[1])):
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0, (arguments, result.output)
    loaded = {"torch", "transformers", "diffusers"} & set(sys.modules)
    assert not loaded, (arguments, loaded)
"""


def test_a_mistake_is_answered_without_torch(db, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (20, 20)).save(photos / "0.png")
    (photos / "0.txt").write_text("a boat")
    (tmp_path / "list.csv").write_text("text,url\na boat,0.png\n")
    (tmp_path / "file").write_text("x")
    (photos / "broken.png").write_bytes(b"not an image")
    build = ["build", photos, "--out", tmp_path / "new"]
    mistakes = [
        ["build", "nothing", "--out", tmp_path / "new"],
        ["build", tmp_path / "list.csv", "--out", tmp_path / "new"],
        ["build", photos / "0.png", "--out", tmp_path / "new"],
        ["build", photos, "--out", photos],
        ["build", photos, "--out", db],
        ["build", photos, "--out", tmp_path / "file"],
        [*build, "--dtype", "half"],
        [*build, "--device", "gpu"],
        [*build, "--feature-dtype", "float15"],
        [*build, "--key", "clipp"],
        [*build, "--key", "clip"],
        [*build, "--batch-size", "0"],
        [*build, "--batch-size", "100000"],
        [*build, "--size", "100000"],
        [*build, "--size", "63"],
        [*build, "--caption", "text"],
        ["build", "", "--out", tmp_path / "new"],
        [*build, "--model", "nothing"],
        [*build, "--model", photos],
        ["append", tmp_path / "new", photos],
        ["append", db, "nothing"],
        ["append", db, photos],
        ["append", db, photos / "0.png"],
        ["append", db, photos / "gone.png", "--caption", "x"],
        ["append", db, photos / "0.png", "--caption", ""],
        ["append", db, photos / "broken.png", "--caption", "x", "--model", "shapes"],
        ["search", "nothing", "a boat"],
        ["search", db, "a boat", "--retriever", "bm26"],
        ["search", db, ""],
        ["search", db, "a boat", "-k", "0"],
        ["search", db, "a boat", "-k", "1000000000"],
        ["list", photos],
        ["list", db, "--where", "a"],
        ["show", db, "99"],
        ["export", db, tmp_path / "x.txt"],
        ["info", tmp_path / "file"],
        ["remove", db, "99"],
        ["remove", db],
        ["copy", "nothing", tmp_path / "new"],
    ]  # fmt: skip
    (tmp_path / "mistakes.json").write_text(json.dumps([[str(part) for part in mistake] for mistake in mistakes]))
    subprocess.run([sys.executable, "-c", MISTAKES, str(tmp_path / "mistakes.json")], check=True)
    assert not (tmp_path / "new").exists()


def test_two_values_of_one_column_are_refused(db):
    for command in ("list", "remove"):
        with pytest.raises(InvalidRequest, match="names 'rank' twice"):
            text(command, db, "--where", "rank=1", "--where", "rank=2")


def test_a_copy_that_would_hide_the_embedded_model_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="would hide the embedded model"):
        text("copy", "shapes", "shapes")
    assert not list(tmp_path.iterdir())
