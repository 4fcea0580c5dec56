"""`ragturbo db …` from end to end: what it prints, what it leaves, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ragturbo import Database
from ragturbo.cli.db import app
from ragturbo.errors import DatabaseError, InvalidRequest


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
    assert run("append", db, images, "--model", tiny_sd21, "--device", "cpu")["pairs"] == 5
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
    for wrong in (["remove", tmp_path / "db"], ["remove", tmp_path / "db", "--where", "source"]):
        with pytest.raises(InvalidRequest):
            run(*wrong)
