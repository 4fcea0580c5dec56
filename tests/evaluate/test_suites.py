"""Suites of prompts and the names of systems."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from ragturbo.errors import InvalidRequest
from ragturbo.evaluate import suites
from ragturbo.evaluate.systems import KINDS, parse_system


def test_shapes_asks_for_unseen_captions_half_of_them_rare_and_the_same_ones_every_time():
    suite = suites.shapes(40)
    assert [p.group for p in suite.prompts].count("rare") == 20
    assert suite.prompts == suites.shapes(40).prompts
    from ragturbo.evaluate.world import parse

    assert {parse(p.text).split for p in suite.prompts} == {"eval"}
    assert len({p.seed for p in suite.prompts}) == 40


def test_a_shortened_run_says_so_and_draws_the_same_images():
    whole, part = suites.shapes(40), suites.shapes(40).head(7)
    assert part.title == "shapes, 7 of 40 prompts" and whole.title == "shapes, 40 prompts"
    assert [p.seed for p in part.prompts] == [p.seed for p in whole.prompts[:7]]
    with pytest.raises(InvalidRequest):
        whole.head(0)


def test_coco_takes_the_first_caption_of_each_image(tmp_path):
    notes = [
        {"image_id": 7, "id": 30, "caption": "later"},
        {"image_id": 7, "id": 12, "caption": "a  dog\nruns"},
        {"image_id": 3, "id": 40, "caption": "a boat"},
    ]
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": notes}))
    suite = suites.coco(path)
    assert [(p.id, p.text) for p in suite.prompts] == [("000000000003", "a boat"), ("000000000007", "a dog runs")]
    assert suite.metrics == ("clip",) and suites.coco(path, tmp_path).metrics == ("fid", "clip")


def test_tifa_reads_its_own_files_and_a_prompt_without_questions_is_refused(tmp_path):
    texts, asked = tmp_path / "texts.json", tmp_path / "questions.json"
    texts.write_text(json.dumps([{"id": "drawbench_1", "caption": "a red cube"}]))
    question = {"id": "drawbench_1", "question": "what colour?", "choices": ["red", "blue"], "answer": "red"}
    asked.write_text(json.dumps([{**question, "element_type": "color", "caption": "a red cube"}]))
    suite = suites.tifa(texts, asked)
    assert suite.title == "tifa, 1 of 4081 prompts"
    assert suite.prompts[0].meta["questions"][0]["answer"] == "red"
    asked.write_text("[]")
    with pytest.raises(InvalidRequest, match="no question for prompt drawbench_1"):
        suites.tifa(texts, asked)


def test_classes_are_folders_of_images(tmp_path):
    for name in ("001.Black_footed_Albatross", "empty", "tench"):
        (tmp_path / name).mkdir()
    for name in ("001.Black_footed_Albatross", "tench"):
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    suite = suites.classes(tmp_path, per_class=2)
    assert [p.text for p in suite.prompts] == ["a photo of a Black footed Albatross"] * 2 + ["a photo of a tench"] * 2


def test_text_passes_over_comments_and_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# mine\n\na boat\n  a dog \n")
    assert [p.text for p in suites.text(path).prompts] == ["a boat", "a dog"]
    path.write_text("\n")
    with pytest.raises(InvalidRequest, match="no prompts"):
        suites.text(path)


@pytest.mark.parametrize("what", ["coco", "tifa"])
def test_a_missing_file_is_named_with_what_it_should_be(what, tmp_path):
    path = Path(tmp_path / "nowhere.json")
    with pytest.raises(InvalidRequest, match="nowhere.json does not exist; expected"):
        suites.coco(path) if what == "coco" else suites.tifa(path, path)


def test_a_systems_name_holds_its_kind_folder_and_options():
    spec = parse_system("diffusers:/models/sdxl@steps=30+guidance=5.5")
    assert (spec.kind, spec.folder, spec.options) == ("diffusers", "/models/sdxl", {"steps": 30, "guidance": 5.5})
    assert parse_system("slerp@w=0.6+per=token").options == {"w": 0.6, "per": "token"}
    assert "/" not in spec.slug and parse_system("adapter").slug == "adapter"


@pytest.mark.parametrize("text", ["", "magic", "slerp@", "slerp@w", "slerp@=1", "Adapter"])
def test_a_name_that_means_nothing_is_refused(text):
    with pytest.raises(InvalidRequest):
        parse_system(text)


def test_every_kind_of_the_paper_is_there():
    assert {"adapter", "slerp", "slerp-best", "student", "teacher", "sd15", "sd21", "lcm", "sd-turbo"} <= set(KINDS)
