"""A whole evaluation on a small model: stored files, interrupted runs, report and contact sheet."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ragturbo import Database, Generator
from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.evaluate.evaluation import Evaluation
from ragturbo.evaluate.faithfulness import Faithfulness
from ragturbo.evaluate.images import draw_images, image_path, read_notes
from ragturbo.evaluate.scores import ImageScore, read_scores
from ragturbo.evaluate.suites import Suite, shapes, text
from ragturbo.evaluate.systems import LoadOptions, open_system, parse_system
from ragturbo.model.adapter import HSpaceAdapter
from ragturbo.retrieval import Geometry, Record

CAPTIONS = ["a red circle", "a blue square", "a green triangle", "a yellow boat"]


@pytest.fixture(scope="module")
def model(tiny, tmp_path_factory) -> Path:
    """A bundle with adapter, database and teacher."""
    from diffusers import UNet2DConditionModel

    path = tiny.make_bundle(tmp_path_factory.mktemp("eval") / "model")
    with Generator.from_pretrained(path, device="cpu") as gen, torch.random.fork_rng():
        torch.manual_seed(0)
        bundle = gen._bundle
        adapter = HSpaceAdapter(bundle.unet.channels)
        torch.nn.init.normal_(adapter.proj_out.weight, std=0.3)
        adapter.save(path)
        images = torch.rand(len(CAPTIONS), 3, bundle.default_size, bundle.default_size) * 2 - 1
        keys, rows = gen._engine.encode_pairs(CAPTIONS, images)
        side = int(rows.shape[1] ** 0.5)
        geometry = Geometry(side, side, rows.shape[2], "float16", keys.shape[1])
        # The last pair has no thumbnail.
        records = [Record(i, c, thumbnail=None if i == 3 else thumbnail(i)) for i, c in enumerate(CAPTIONS)]
        batch = (records, keys.numpy(), rows.numpy().astype(np.float16))
        Database.write(path / "database", [batch], geometry=geometry, encoder=bundle.fingerprint())
    UNet2DConditionModel.from_pretrained(path / "unet").save_pretrained(path / "teacher_unet")
    return path


def thumbnail(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), (60 * i, 0, 0)).save(buffer, "WEBP")
    return buffer.getvalue()


@pytest.fixture
def suite(tmp_path) -> Suite:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(["a red circle", "a dog", "</script><b>a boat</b>", "a blue square above a star"]))
    return text(path)


class Brightness:
    """A metric with a known answer."""

    name = "brightness"
    about = "mean of all bytes"

    def score(self, prompts, images):
        return [ImageScore(p.id, float(np.asarray(i).mean()) / 255) for p, i in zip(prompts, images, strict=True)]


def evaluation(suite: Suite, names: list[str], model: Path, out: Path) -> Evaluation:
    specs = [parse_system(name) for name in names]
    return Evaluation(suite, specs, LoadOptions(str(model), device="cpu"), out, [Brightness()], command="test")


def test_every_system_of_ours_draws_with_the_seeds_it_is_given(model, suite, tmp_path):
    names = ["student", "none", "slerp@w=0.5+k=2", "lerp@w=0.5", "adapter", "wrong", "teacher@steps=2+guidance=3"]
    rows = evaluation(suite, names, model, tmp_path / "out").run()
    by_name = {row.system: row for row in rows}
    assert [row.system for row in rows] == names
    assert by_name["teacher@steps=2+guidance=3"].steps == 2 and by_name["student"].steps == 1
    drawn = {
        name: [np.asarray(Image.open(image_path(tmp_path / "out", parse_system(name), p))) for p in suite.prompts]
        for name in names
    }
    with Generator.from_pretrained(model, adapter=False, device="cpu") as gen:
        own = gen([p.text for p in suite.prompts], seed=[p.seed for p in suite.prompts], mode="none").images
    assert all(np.array_equal(a, b) for a, b in zip(drawn["student"], own, strict=True))
    # Images with neighbours differ from those without.
    for name in ("slerp@w=0.5+k=2", "adapter", "wrong"):
        assert any(not np.array_equal(a, b) for a, b in zip(drawn[name], drawn["none"], strict=True)), name
    assert read_notes(tmp_path / "out", parse_system("adapter"))["000000"]["neighbors"] == ["a red circle"]


def test_the_report_has_the_table_and_the_sheet_escapes_what_prompts_hold(model, suite, tmp_path):
    out = tmp_path / "out"
    [student, adapter] = evaluation(suite, ["student", "adapter"], model, out).run()
    facts = json.loads((out / "report.json").read_text())
    values = [np.asarray(Image.open(p)).mean() / 255 for p in sorted((out / "images" / "adapter").glob("*.png"))]
    assert facts["rows"][1]["metrics"]["brightness"]["mean"] == pytest.approx(float(np.mean(values)))
    assert adapter.differences["brightness"].count == len(suite.prompts) and not student.differences
    report, sheet = (out / "report.md").read_text(), (out / "sheet.html").read_text()
    assert "| ragturbo | 1 |" in report and "text, 4 prompts" in report
    assert "<b>a boat</b>" not in sheet and sheet.count("</script>") == 1
    assert all((out / src).is_file() for src in re.findall(r'<img loading="lazy" src="([^"]+)"', sheet))


def test_the_sheet_shows_each_images_seed_and_score_and_the_pictures_of_its_neighbours(model, suite, tmp_path):
    out = tmp_path / "out"
    evaluation(suite, ["student", "adapter"], model, out).run()
    sheet, prompts = (out / "sheet.html").read_text(), suite.prompts
    scores = read_scores(out, "brightness", parse_system("adapter"))
    cells = re.findall(r"<td><img.*?</td>", sheet)
    assert len(cells) == 2 * len(prompts)
    for prompt, cell in zip(prompts, cells[1::2], strict=True):
        assert f"brightness {scores[prompt.id].value:.3f} · seed {prompt.seed}" in cell
        [id] = read_notes(out, parse_system("adapter"))[prompt.id]["neighbor_ids"]
        assert f"#{id} {CAPTIONS[id]}" in cell and (f"images/neighbors/{id}.webp" in cell) == (id != 3)
    assert "<figure>" not in "".join(cells[::2])
    assert (out / "images/neighbors/0.webp").read_bytes() == thumbnail(0)


def test_by_default_a_model_is_asked_for_what_it_can_do(model, tiny_sd21):
    from ragturbo.cli.eval import default_systems

    def systems(folder: Path, database: str | None = None, adapter: str | None = None, suite: str = "shapes") -> str:
        return default_systems(str(folder), database, adapter, suite, False)

    assert systems(model) == "student,slerp@w=0.8,adapter,teacher@guidance=3"
    assert systems(model, suite="text", adapter="off") == "student,slerp@w=0.8,teacher"
    assert systems(tiny_sd21) == "student"
    with pytest.raises(ModelError, match="there is no adapter some"):
        systems(tiny_sd21, adapter="some")
    assert systems(tiny_sd21, database="some") == "student,slerp@w=0.8"
    assert systems(model, database="off") == "student,teacher@guidance=3"


def test_an_image_that_is_there_is_not_drawn_again_and_a_missing_one_is(model, suite, tmp_path):
    loading, spec, out = LoadOptions(str(model), device="cpu"), parse_system("student"), tmp_path / "out"
    draw_images(suite, spec, loading, out, batch=3)
    paths = [image_path(out, spec, p) for p in suite.prompts]
    before = [p.read_bytes() for p in paths]
    paths[2].unlink()
    stamps = [p.stat().st_mtime_ns for i, p in enumerate(paths) if i != 2]
    draw_images(suite, spec, loading, out)
    assert [p.stat().st_mtime_ns for i, p in enumerate(paths) if i != 2] == stamps
    # The missing image is now drawn alone, in another batch bucket.
    again = np.asarray(Image.open(paths[2])).astype(int)
    assert paths[0].read_bytes() == before[0] and again.shape == (128, 128, 3)


def test_a_folder_belongs_to_one_run(model, suite, tmp_path):
    evaluation(suite, ["student"], model, tmp_path / "out").run()
    with pytest.raises(InvalidRequest, match="holds a run with suite='text', this one has suite='shapes'"):
        evaluation(shapes(4), ["student"], model, tmp_path / "out").run()
    with pytest.raises(InvalidRequest, match="same name"):
        evaluation(suite, ["student", "student"], model, tmp_path / "other").run()


def test_processes_share_the_work_and_the_last_one_reports(model, suite, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert evaluation(suite, ["student"], model, out).run() == []
    assert len(list((out / "images" / "student").glob("*.png"))) == 2
    monkeypatch.setenv("RANK", "0")
    assert len(evaluation(suite, ["student"], model, out).run()) == 1


def test_a_best_of_system_keeps_what_scores_best(model, suite):
    loading = LoadOptions(str(model), device="cpu")

    def score(i: int, image: Image.Image) -> float:
        return float(np.asarray(image).mean())

    prompts, seeds = [p.text for p in suite.prompts], [p.seed for p in suite.prompts]
    best = open_system(parse_system("slerp-best"), loading)
    fixed = open_system(parse_system("slerp@w=0.3"), loading)
    try:
        chosen, plain = best.draw(prompts, seeds, score), fixed.draw(prompts, seeds, score)
    finally:
        best.close()
        fixed.close()
    assert all(score(0, c.image) >= score(0, p.image) for c, p in zip(chosen, plain, strict=True))
    assert all(re.fullmatch(r"w=0\.[1-9]", c.chosen) for c in chosen)


def test_an_unknown_option_of_a_system_is_refused():
    with pytest.raises(InvalidRequest, match="has no option 'lam'"):
        parse_system("slerp@lam=1")


def test_a_system_names_its_retriever_and_whether_it_composes(tiny_sd21):
    assert parse_system("adapter@retriever=hybrid+compose=true").options == {"retriever": "hybrid", "compose": True}
    spec = parse_system(f"slerp:{tiny_sd21}@retriever=bm25+compose=false")
    system = open_system(spec, LoadOptions(device="cpu"))
    assert system.generator.config.retriever == "bm25" and system.generator.config.compose is False
    system.close()


def test_the_exact_score_of_true_pictures_is_high_and_of_other_captions_low():
    from ragturbo.evaluate.rendering import render
    from ragturbo.evaluate.world import sample_scenes

    suite, metric = shapes(60), Faithfulness()
    scenes = {s.caption: s for s in [*sample_scenes(30, 20_260, "eval", rare=False)]}
    prompts = [p for p in suite.prompts if p.text in scenes]
    images = [Image.fromarray(render(scenes[p.text])) for p in prompts]
    right = [s.value for s in metric.score(prompts, images)]
    wrong = [s.value for s in metric.score(prompts, images[1:] + images[:1])]
    assert np.mean(right) > 0.98 and np.mean(wrong) < 0.7


RUN = """
import sys
from pathlib import Path
from ragturbo.evaluate.images import draw_images
from ragturbo.evaluate.suites import text
from ragturbo.evaluate.systems import LoadOptions, parse_system
options = LoadOptions(sys.argv[2], device="cpu")
draw_images(text(Path(sys.argv[1])), parse_system("student"), options, Path(sys.argv[3]), batch=1)
"""


@pytest.mark.timeout(3600)
def test_a_killed_run_ends_with_the_same_images(model, tmp_path, rng, long_count):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"a boat {i}" for i in range(24)))
    suite, spec, loading = text(prompts), parse_system("student"), LoadOptions(str(model), device="cpu")
    draw_images(suite, spec, loading, tmp_path / "whole", batch=1)
    out = tmp_path / "killed"
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(prompts), str(model), str(out)]
    for _ in range(long_count(10)):
        have = len(list((out / "images" / "student").glob("*.png"))) if out.exists() else 0
        child = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
        # Killed at a random moment after it has begun to draw, not while it imports.
        while child.poll() is None and len(list((out / "images" / "student").glob("*.png"))) <= have:
            time.sleep(0.01)
        time.sleep(float(rng.uniform(0, 0.3)))
        child.send_signal(signal.SIGKILL)
        child.wait()
    draw_images(suite, spec, loading, out, batch=1)
    for prompt in suite.prompts:
        assert image_path(out, spec, prompt).read_bytes() == image_path(tmp_path / "whole", spec, prompt).read_bytes()
    assert set(read_notes(out, spec)) == {p.id for p in suite.prompts}
