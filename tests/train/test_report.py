"""What the `data` commands say they left out, and the list they keep."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from typer.testing import CliRunner

from ragturbo.errors import InvalidRequest
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.folder import INDEX, SKIPPED, Plan
from ragturbo.train.neighbors import make_neighbors
from ragturbo.train.prompts import read_prompts
from ragturbo.train.relabel import relabel
from ragturbo.train.shards import Shards, write_shard
from ragturbo.train.teacher import make_teacher_data


@pytest.fixture
def pictures(tmp_path):
    """Five usable pictures of eight, as a table."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rows = []
    for i in range(6):
        side = 40 if i == 2 else 64
        pixels = np.random.default_rng(i).integers(0, 255, (side, side + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "caption": f"a red {i}"})
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    rows.insert(1, {"image": "broken.png", "caption": "broken"})
    rows.append({"image": "0.png", "caption": "  "})
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "pairs.jsonl"


@pytest.fixture
def options(world):
    return {"model": str(world.model), "size": 64, "min_size": 64, "shard_size": 2, "batch": 2, "device": "cpu"}


def skipped(folder):
    return [json.loads(line) for line in (folder / SKIPPED).read_text().splitlines()]


def test_what_is_left_out_is_counted_named_and_listed(pictures, options, tmp_path, caplog):
    report = make_encoded_data(pictures, tmp_path / "d", **options)
    assert (report.samples, report.skipped, report.shards, report.made, report.missing) == (5, 3, 4, 4, 0)
    assert list(report.reasons.values()) == [1, 1, 1]
    assert "a side under --min-size 64 pixels" in report.reasons
    entries = skipped(tmp_path / "d")
    assert [entry["item"] for entry in entries] == [1, 3, 7]
    assert "the image cannot be read" in entries[0]["reason"] and entries[0]["source"].endswith("broken.png")
    assert entries[1]["reason"].endswith("pixels: 40") and "caption is empty" in entries[2]["reason"]
    warning = "\n".join(record.message for record in caplog.records if record.levelno == logging.WARNING)
    assert "3 of 8 inputs left out" in warning and "broken.png" in warning and str(tmp_path / "d" / SKIPPED) in warning
    assert str(report) == f"wrote 4 shards to {tmp_path / 'd'}, which has 5 samples in 4 shards"


def test_the_list_is_whole_after_a_resume_and_with_several_processes(pictures, options, tmp_path, monkeypatch):
    make_encoded_data(pictures, tmp_path / "once", **options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    part = make_encoded_data(pictures, tmp_path / "parts", **options)
    assert part.missing == 2 and "2 of 4 shards are still missing" in str(part) and part.skipped_list is None
    # The other process is killed in its second shard; one alone goes on.
    (tmp_path / "parts" / "000000.safetensors").write_bytes((tmp_path / "once" / "000000.safetensors").read_bytes())
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    whole = make_encoded_data(pictures, tmp_path / "parts", **options)
    assert (whole.made, whole.samples, whole.skipped) == (1, 5, 3)
    assert (tmp_path / "parts" / SKIPPED).read_bytes() == (tmp_path / "once" / SKIPPED).read_bytes()
    again = make_encoded_data(pictures, tmp_path / "parts", **options)
    assert (again.made, again.samples, again.skipped, again.reasons) == (0, 5, 3, whole.reasons)


def test_nothing_usable_is_an_error_with_the_reasons_and_the_folder_can_be_used_again(pictures, options, tmp_path):
    with pytest.raises(InvalidRequest) as error:
        make_encoded_data(pictures, tmp_path / "d", **{**options, "min_size": 1024})
    assert "none of 8 pairs can be used: 6 × a side under --min-size 1024 pixels, such as input 0" in str(error.value)
    assert len(skipped(tmp_path / "d")) == 8 and not (tmp_path / "d" / INDEX).exists()
    assert make_encoded_data(pictures, tmp_path / "d", **options).samples == 5
    assert len(skipped(tmp_path / "d")) == 3


def test_rows_of_prompts_that_are_left_out_are_counted(world, tmp_path):
    rows = [{"caption": "a red cat", "aes": 7}, {"caption": "a dog", "aes": 4}, {"caption": "", "aes": 9}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"caption": "a boat"}])))
    chosen = read_prompts(tmp_path / "p.jsonl", score_column="aes", min_score=5)
    assert chosen.texts == ["a red cat"] and [entry["item"] for entry in chosen.left_out] == [1, 2, 3]
    options = {"model": str(world.model), "steps": 1, "device": "cpu", "left_out": chosen.left_out}
    report = make_teacher_data(chosen.texts, tmp_path / "d", **options)
    assert report.samples == 1 and report.skipped == 3
    assert report.reasons == {"aes under 5": 1, "the prompt is empty": 1, "no number in column 'aes'": 1}
    assert skipped(tmp_path / "d") == chosen.left_out
    with pytest.raises(
        InvalidRequest, match="holds no prompts: none of 4 prompts can be used: 2 × aes under 10, such as input 0"
    ):
        read_prompts(tmp_path / "p.jsonl", score_column="aes", min_score=10)


def test_prompts_that_are_cut_off_are_counted(world, tmp_path, caplog):
    long = "a red cat " * 200
    report = make_teacher_data(["a cat", long], tmp_path, model=str(world.model), steps=1, shard_size=1, device="cpu")
    assert report.notes["cut_off"]["count"] == 1 and report.skipped == 0
    assert "1 prompt is longer than the text encoder reads" in caplog.text and not (tmp_path / SKIPPED).exists()
    # The shard has the note, so a run that does nothing says it, too.
    again = make_teacher_data(["a cat", long], tmp_path, model=str(world.model), steps=1, shard_size=1, device="cpu")
    assert again.made == 0 and again.notes == report.notes


def test_an_empty_prompt_leaves_a_sample_out_of_a_relabelled_folder_and_is_counted(world, tmp_path):
    prompts = [f"short {i}" if i else "" for i in range(len(Shards(world.data)))]
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    texts = read_prompts(tmp_path / "p.txt", keep_empty=True).texts
    report = relabel(world.data, texts, tmp_path / "d", model=str(world.model), device="cpu")
    assert report.samples == len(prompts) - 1 and report.reasons == {"the prompt is empty": 1}
    assert skipped(tmp_path / "d")[0]["item"] == 0


def test_samples_with_too_few_neighbours_are_counted_whichever_run_found_them(world, tmp_path, caplog):
    Plan("encoded", 3, 2, {}).write_or_check(tmp_path)
    for shard, captions in enumerate((["a red circle", "another"], ["a red cat"])):
        tensors = {
            "latents": torch.zeros(len(captions), 4, 8, 8),
            "input_ids": Shards(world.data).tensor(0, "input_ids"),
        }
        tensors["input_ids"] = tensors["input_ids"][: len(captions)]
        write_shard(tmp_path, shard, tensors, [{"caption": caption} for caption in captions])
    from ragturbo.retrieval.database import Database

    rows = len(Database.open(world.database))
    report = make_neighbors(tmp_path, world.database, model=str(world.model), k=rows, device="cpu")
    assert report.samples == 3 and report.notes["few_neighbors"]["count"] == 2
    assert "2 samples have too few neighbours" in caplog.text
    again = make_neighbors(tmp_path, world.database, model=str(world.model), k=rows, device="cpu")
    assert again.made == 0 and again.notes == report.notes


def test_every_data_command_prints_json(world, pictures, tmp_path):
    from ragturbo.cli import data

    app = typer.Typer()
    app.add_typer(data.app, name="data")

    def run(*arguments):
        words = [str(word) for word in ("data", *arguments, "--device", "cpu", "--json")]
        result = CliRunner().invoke(app, words, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    (tmp_path / "p.txt").write_text("a red cat\n\na red dog\na blue cat\na blue dog\n")
    (tmp_path / "q.txt").write_text("\n".join("abcd"))
    model, out = ("--model", world.model), tmp_path / "d"
    made = run("teacher", tmp_path / "p.txt", "--out", out, "--steps", 1, *model)
    assert (made["out"], made["shards"], made["made"], made["samples"], made["skipped"]) == (str(out), 1, 1, 4, 1)
    assert made["skipped_list"] == str(out / SKIPPED) and made["seconds"] > 0
    encoded = run("encode", pictures, "--out", tmp_path / "r", "--min-size", 64, "--size", 64, *model)
    assert encoded["samples"] == 5 and sum(encoded["reasons"].values()) == encoded["skipped"] == 3
    assert run("relabel", out, tmp_path / "q.txt", "--out", tmp_path / "q", *model)["samples"] == 4
    found = run("neighbors", out, "--database", world.database, "-k", 1, *model)
    assert found["samples"] == 4 and found["out"] == str(out / "neighbors")
    vgg = run("lpips", out, "--out", tmp_path / "v.safetensors", "--width", 2, "--steps", 1, "--batch", 2)
    assert vgg["out"] == str(tmp_path / "v.safetensors") and 0 <= vgg["average_precision"] <= 1


def test_one_shard_is_not_1_shards(world, tmp_path):
    report = make_teacher_data(["a cat"], tmp_path, model=str(world.model), steps=1, device="cpu")
    assert str(report) == f"wrote 1 shard to {tmp_path}, which has 1 sample in 1 shard"
