"""Wrong options of `ragturbo eval`: answered in words, before torch is imported and anything is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

WRONG = {
    "--batch 0": "Invalid value for '--batch'",
    "--count 0": "Invalid value for '--count'",
    "--limit 0": "Invalid value for '--limit'",
    "--captions x --vqa y": "without effect with --suite shapes: --captions (for coco), --vqa (for tifa)",
    "--suite text --prompts p.txt --count 1000": "without effect with --suite text: --count (for shapes)",
    "--suite foo": "--suite foo is not one of 'shapes'",
    "--suite coco": "--suite coco needs --captions",
    "--suite text --prompts nowhere.txt": "nowhere.txt does not exist; expected prompts, one a line",
    "--suite coco --captions c.json --fid-weights p.txt": "--fid-weights has no effect without --references",
    "--suite coco --captions c.json --references nowhere": "--references: there is no file or folder nowhere",
    "--suite coco --captions c.json": "its annotations must have id, image_id and caption",
    "--suite classes --classes . --encoders dino": "--encoders dino: write name=folder",
    "--systems foo": "kind 'foo' is not one of",
    "--database nowhere": "there is no database nowhere",
    "--out p.txt": "p.txt is a file, not a folder",
}


def test_wrong_options_are_answered_in_words_without_torch(answers_without_torch, tmp_path: Path):
    (tmp_path / "p.txt").write_text("a boat\n")
    (tmp_path / "c.json").write_text(json.dumps({"annotations": [{"id": 1}]}))
    answers = answers_without_torch([["eval", *line.split()] for line in WRONG], tmp_path)
    for (line, words), said in zip(WRONG.items(), answers, strict=True):
        assert words in said and "Errno" not in said, (line, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.json", "p.txt"]


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_run_json_is_told(content: str, tmp_path: Path):
    from ragturbo.errors import DatabaseCorrupt
    from ragturbo.evaluate.images import check_folder
    from ragturbo.evaluate.suites import shapes
    from ragturbo.evaluate.systems import LoadOptions

    (tmp_path / "images" / "student").mkdir(parents=True)
    (tmp_path / "images" / "student" / "a.png").touch()
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(DatabaseCorrupt, match=r"run\.json"):
        check_folder(tmp_path, shapes(2), LoadOptions())


def test_a_folder_of_another_database_is_told_in_words_and_one_without_images_is_used_again(tmp_path: Path):
    from ragturbo.errors import InvalidRequest
    from ragturbo.evaluate.images import check_folder
    from ragturbo.evaluate.suites import shapes
    from ragturbo.evaluate.systems import LoadOptions

    check_folder(tmp_path, shapes(2), LoadOptions(database="wrong"))
    check_folder(tmp_path, shapes(2), LoadOptions())
    (tmp_path / "images" / "student").mkdir(parents=True)
    (tmp_path / "images" / "student" / "a.png").touch()
    with pytest.raises(InvalidRequest, match="a run with the model's own database, this one has no database; choose"):
        check_folder(tmp_path, shapes(2), LoadOptions(database=False))
