"""Wrong options of `ragturbo data`: answered in words before torch is imported, and nothing is left that blocks."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ragturbo.errors import InvalidRequest
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.folder import INDEX, Plan, check_data_output, count_samples
from ragturbo.train.neighbors import make_neighbors
from ragturbo.train.prompts import read_prompts
from ragturbo.train.shards import Shards, write_shard

WRONG = {
    "teacher p.txt --out t --model MODEL --caption-column foo": "plain text and has no columns: --caption-column has",
    "teacher p.txt --out t --model MODEL --guidance -1": "--guidance -1.0 must be a number in [0, 1000]",
    "teacher p.txt --out t --model MODEL --guidance nan": "--guidance nan must be a number",
    "teacher p.txt --out t --model MODEL --seed -1": "Invalid value for '--seed'",
    "teacher p.txt --out pictures --model MODEL": "pictures holds other files, such as a.png",
    "encode pictures --out pictures --model MODEL": "pictures holds other files, such as a.png",
    "encode pictures --out t --model MODEL --min-score 4": "--min-score needs --score-column",
    "relabel DATA p.txt --out t --model MODEL": "1 prompt for the 20 samples of",
    "neighbors DATA --database DATABASE --model MODEL --retriever bm25": "by their keys, which bm25 does not read",
    "neighbors DATA --database DATABASE --model MODEL --max-cosine nan": "--max-cosine nan must be a number",
    "lpips DATA --out v.safetensors --lr nan": "--lr nan must be a number",
}


def test_wrong_options_are_answered_in_words_without_torch(answers_without_torch, world, tmp_path):
    (tmp_path / "p.txt").write_text("a boat\n")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    named = {"MODEL": world.model, "DATABASE": world.database, "DATA": tmp_path / "data"}
    shutil.copytree(world.data, tmp_path / "data")
    lines = [["data", *(str(named.get(word, word)) for word in line.split())] for line in WRONG]
    for (line, words), said in zip(WRONG.items(), answers_without_torch(lines, tmp_path), strict=True):
        assert words.replace("20 samples", f"{len(Shards(world.data))} samples") in said, (line, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "p.txt", "pictures"]


def test_a_command_that_failed_does_not_block_the_corrected_one(world, tmp_path):
    pictures, out = tmp_path / "pictures", tmp_path / "out"
    pictures.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(pictures / "a.png")
    (pictures / "a.txt").write_text("a red cat")
    options = {"model": str(world.model), "min_size": 8, "device": "cpu"}
    with pytest.raises(InvalidRequest, match="multiples of"):
        make_encoded_data(pictures, out, size=63, **options)
    assert not (out / INDEX).exists()
    assert make_encoded_data(pictures, out, size=64, **options).samples == 1
    shutil.copytree(world.data, tmp_path / "data", ignore=shutil.ignore_patterns("neighbors"))
    with pytest.raises(InvalidRequest, match="bm25"):
        make_neighbors(tmp_path / "data", world.database, model=str(world.model), retriever="bm25", device="cpu")
    assert not (tmp_path / "data" / "neighbors").exists()


def test_an_index_without_a_shard_does_not_block_other_settings(tmp_path):
    Plan("encoded", 1, 1, {"size": 63}).write_or_check(tmp_path)
    plan = Plan("encoded", 1, 1, {"size": 64, "vae": "ab" * 32})
    plan.write_or_check(tmp_path)
    write_shard(tmp_path, 0, {"latents": torch.zeros(1, 4, 8, 8)}, [{"caption": "a"}])
    assert Shards(tmp_path).plan == plan and count_samples(tmp_path, plan) == 1
    said = r"made_by.size \(was 64, now not set\), made_by.vae \(was 'abababab…', now 'cdcdcdcd…'\). Use those, choose"
    with pytest.raises(InvalidRequest, match=said):
        Plan("encoded", 1, 1, {"vae": "cd" * 32}).check(tmp_path)


def test_samples_are_written_to_an_empty_folder_or_one_of_samples(tmp_path):
    check_data_output(tmp_path / "new")
    check_data_output(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(InvalidRequest, match=r"holds other files, such as index\.json"):
        check_data_output(tmp_path)
    (tmp_path / INDEX).unlink()
    Plan("encoded", 1, 1, {}).write_or_check(tmp_path)
    check_data_output(tmp_path)


def test_a_caption_that_is_no_text_is_no_prompt(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"caption": ["a", "b"]}\n{"caption": null}\n{"caption": "a cat"}\n')
    found = read_prompts(tmp_path / "p.jsonl")
    reasons = [entry["reason"] for entry in found.left_out]
    assert found.texts == ["a cat"] and reasons == ["the prompt is not a text: ['a', 'b']", "the prompt is empty"]
