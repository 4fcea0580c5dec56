"""`ragturbo db …` from end to end: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from ragturbo import Database, Generator
from ragturbo.cli.db import app
from ragturbo.errors import DatabaseError, InvalidRequest
from ragturbo.retrieval import durable


@pytest.fixture
def images(plain, tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i, (caption, picture, _) in enumerate(plain.pairs(6)):
        picture.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    (folder / "5.txt").write_text("")
    return folder


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return {**json.loads(result.stdout), "exit": result.exit_code}


def test_a_database_is_built_changed_and_proven_from_the_command_line(images, tiny_sd21, tmp_path):
    db = tmp_path / "db"
    made = run("build", images, "--out", db, "--model", tiny_sd21, "--device", "cpu", "--batch-size", 4)
    assert made["pairs"] == 5 and made["skipped"][0]["reason"] == "the caption is empty"
    added = run("append", db, images, "--model", tiny_sd21, "--device", "cpu")
    assert (added["added"], added["pairs"], len(added["skipped"])) == (5, 10, 1)
    facts = run("info", db)
    assert facts["pairs"] == 10 and facts["retriever"] == "exact" and "fewer than 20000" in facts["why"]
    assert run("remove", db, 0, 1) == {"removed": 2, "pairs": 8, "exit": 0}
    assert run("remove", db, "--where", "source=2.png")["removed"] == 2
    assert run("verify", db)["whole"]
    assert run("reindex", db)["index"] is None
    sizes = run("compact", db)
    assert sizes["bytes_after"] < sizes["bytes_before"]
    assert Database.open(db, verify="full").ids.tolist() == [3, 4, 6, 7, 9, 10]


@pytest.mark.slow
def test_torchrun_builds_with_two_processes_what_one_builds(images, plain, tiny_sd21, tmp_path):
    """Each writes its own segments; they communicate through the folder, without a process group or a backend."""
    for i, (caption, picture, _) in enumerate(plain.pairs(20, 3), start=6):
        picture.save(images / f"{i:02d}.png")
        (images / f"{i:02d}.txt").write_text(caption)
    # As torchrun sets it for its processes: another number of threads may add in another order.
    torch.set_num_threads(1)
    options = ["--model", tiny_sd21, "--device", "cpu", "--batch-size", 4, "--segment-records", 4]
    run("build", images, "--out", tmp_path / "one", *options)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 0, "--no-python",
               sys.executable, "-c", "from ragturbo.cli import main; raise SystemExit(main())",
               "db", "build", images, "--out", tmp_path / "two", *options]  # fmt: skip
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert plain.tree(tmp_path / "two") == plain.tree(tmp_path / "one")
    assert len(Database.open(tmp_path / "two", verify="full").snapshot.manifest.segments) > 2


def test_damage_is_listed_and_is_exit_code_3(plain, tmp_path):
    plain.change("build", tmp_path / "db", 1)
    path = tmp_path / "db/segments/000000.hseg"
    data = bytearray(path.read_bytes())
    data[4096 + 10] ^= 1
    path.write_bytes(data)
    assert run("verify", tmp_path / "db", "--quick") == {"whole": True, "problems": [], "exit": 0}
    found = run("verify", tmp_path / "db")
    assert found["exit"] == 3 and any("record 0 (id 0): wrong checksum" in line for line in found["problems"])
    with pytest.raises(DatabaseError):
        run("info", tmp_path / "nothing")


def test_human_output_and_wrong_use(plain, tmp_path):
    plain.change("build", tmp_path / "db", 1)
    result = CliRunner().invoke(app, ["info", str(tmp_path / "db")])
    assert "pairs" in result.stdout and "60" in result.stdout and result.exit_code == 0
    assert CliRunner().invoke(app, ["remove"]).exit_code == 2
    for wrong, message in (
        (["remove"], "neither was given"),
        (["remove", "--where", "source"], "must be COLUMN=VALUE"),
        (["remove", 3, "--where", "rank=3"], "both were given"),
        (["remove", "-1"], "-1 is no id: ids are whole numbers from 0 on"),
        (["show", "-1"], "-1 is no id"),
        (["reindex", "--leaves", "-3"], "^leaves=-3 must be a whole number from 0"),
        (["reindex", "--threads", "-1"], "threads=-1 must be a whole number from 0"),
        (["reindex", "--leaves", 4, "--leaves-to-search", 9], "must be from 1 to 4, the number of leaves"),
    ):
        with pytest.raises(InvalidRequest, match=message):
            run(wrong[0], tmp_path / "db", *wrong[1:])
    said = CliRunner().invoke(app, ["reindex", str(tmp_path / "db")]).stdout
    assert said == "no index: exact search is as fast for 60 pairs, fewer than 20000\n"


def text(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_an_image_file_is_appended_with_its_caption_and_the_printed_command_undoes_it(images, tiny_sd21, tmp_path):
    db, model = tmp_path / "db", ["--model", tiny_sd21, "--device", "cpu"]
    run("build", images, "--out", db, *model)
    said = text("append", db, images / "5.png", "--caption", "a zib", *model)
    assert said.stdout == f"1 pair added to {db}: id 6 (`ragturbo db remove {db} 6` undoes it); 6 pairs in all\n"
    added = Database.open(db).records([6])[0]
    assert (added.caption, added.source) == ("a zib", str(images / "5.png"))
    run("remove", db, 6)
    assert Database.open(db).ids.tolist() == [0, 1, 2, 3, 4]


def test_several_image_files_take_one_caption_each_and_are_added_together_or_not_at_all(images, tiny_sd21, tmp_path):
    db, model = tmp_path / "db", ["--model", tiny_sd21, "--device", "cpu"]
    run("build", images, "--out", db, *model)
    two = [images / "0.png", images / "1.png"]
    said = text("append", db, *two, "--caption", "a zib", "--caption", "a frob", *model)
    assert "2 pairs added" in said.stdout and f"remove {db} 6 7`" in said.stdout
    assert [r.caption for r in Database.open(db).records([6, 7])] == ["a zib", "a frob"]
    (images / "broken.png").write_bytes(b"not an image")
    wrong = [
        ([two[0], "--caption", " "], "0.png: the caption is empty"),
        ([two[0]], "1 image file and 0 captions; give one --caption for each"),
        ([*two, "--caption", "a zib"], "2 image files and 1 caption"),
        ([two[0], images / "broken.png", "--caption", "a zib", "--caption", "a frob"], "broken.png.*cannot be read"),
        ([images / "missing.png", "--caption", "a zib"], "missing.png: no such file"),
        ([two[0], images, "--caption", "a zib"], "0.png is an image file and .*images is not"),
        ([images, "--caption", "a zib", "--caption", "a frob"], "2 captions but no image file"),
        ([images, "--caption", "text"], "caption='text' has no effect on a folder of images"),
        ([two[0], "--caption", "a zib", "--image", "url"], "image='url' has no effect"),
    ]
    for arguments, message in wrong:
        with pytest.raises(InvalidRequest, match=message):
            text("append", db, *arguments, *model)
    assert len(Database.open(db)) == 7


def test_a_mistyped_database_is_an_error_and_create_makes_one(images, tiny_sd21, tmp_path):
    db = tmp_path / "db"
    pair = [images / "0.png", "--caption", "a zib", "--model", tiny_sd21, "--device", "cpu"]
    with pytest.raises(DatabaseError, match="there is no database .*db; make one with --create"):
        text("append", db, *pair)
    assert not db.exists()
    said = text("append", db, *pair, "--create")
    assert f"{db} does not exist: making it, for the model {tiny_sd21}" in said.stderr and "id 0" in said.stdout
    # With --create, an existing database is appended to.
    said = text("append", db, *pair, "--create")
    assert "making it" not in said.stderr and "id 1" in said.stdout
    with pytest.raises(DatabaseError, match="is no database and not empty"):
        text("append", images, *pair, "--create")
    assert not (images / "segments").exists()


def test_an_appended_image_is_put_on_white_turned_upright_and_cropped_as_in_a_build(plain, tiny_sd21, tmp_path):
    upright = plain.pairs(1)[0][1]
    sideways = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 270 degrees counterclockwise to see it upright
    sideways.save(tmp_path / "turned.png", exif=exif)
    upright.save(tmp_path / "upright.png")
    clear = Image.new("RGBA", upright.size, (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", upright.size, "white").save(tmp_path / "white.png")
    files = [tmp_path / f"{name}.png" for name in ("turned", "upright", "clear", "white")]
    captions = [part for _ in files for part in ("--caption", "a zib")]
    text("append", tmp_path / "db", *files, *captions, "--model", tiny_sd21, "--device", "cpu", "--create")
    turned, straight, alpha, white = Database.open(tmp_path / "db").rows(range(4))
    assert (turned == straight).all() and (alpha == white).all() and (alpha != straight).any()


def test_a_copy_has_the_same_bytes_and_its_changes_leave_the_original_unchanged(plain, tmp_path):
    source = tmp_path / "source"
    plain.change("build", source, 1)
    plain.change("remove", source, 1)
    before = plain.tree(source)
    assert run("copy", source, tmp_path / "copy") == {
        "database": str(tmp_path / "copy"), "pairs": 40, "generation": 2, "exit": 0,
    }  # fmt: skip
    copied = plain.tree(tmp_path / "copy")
    assert {name: before[name] for name in copied} == copied
    Database.open(tmp_path / "copy", verify="full")
    plain.change("append", tmp_path / "copy", 2)
    plain.change("compact", tmp_path / "copy", 2)
    assert plain.tree(source) == before
    with pytest.raises(DatabaseError, match="holds a database already"):
        run("copy", source, tmp_path / "copy")
    with pytest.raises(DatabaseError, match="/proc/x cannot be made"):
        run("copy", source, "/proc/x")
    with pytest.raises(DatabaseError, match="neither a database nor a model"):
        run("copy", tmp_path / "nothing", tmp_path / "other")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0.png").write_bytes(b"")
    with pytest.raises(DatabaseError, match="not empty"):
        run("copy", source, tmp_path / "photos")


def test_a_copy_that_was_killed_is_made_again(plain, tmp_path, monkeypatch):
    source, target = tmp_path / "source", tmp_path / "copy"
    plain.change("build", source, 1)
    real, calls = durable.link_or_copy, []

    def killed(start: Path, end: Path) -> None:
        calls.append(end)
        if len(calls) == 5:
            end.write_bytes(start.read_bytes()[:100])
            raise KeyboardInterrupt
        real(start, end)

    monkeypatch.setattr(durable, "link_or_copy", killed)
    with pytest.raises(KeyboardInterrupt):
        Database.copy(source, target)
    with pytest.raises(DatabaseError, match="not a ragturbo database"):
        Database.open(target)
    monkeypatch.undo()
    Database.copy(source, target)
    Database.open(target, verify="full")
    assert plain.tree(target).keys() <= plain.tree(source).keys()


def test_the_embedded_models_database_is_copied_by_its_name(tmp_path):
    made = Database.copy("shapes", tmp_path / "db")
    with Generator.from_pretrained("shapes", database=tmp_path / "db", device="cpu") as gen:
        assert gen.info["database"]["pairs"] == len(made) > 0
