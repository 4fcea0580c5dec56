"""The commands of the comparison and the findings, on a tiny model: from data to tables, resumed, by numbers alone."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from ragturbo import Database

RECIPE = Path(__file__).parents[2] / "examples" / "shapes"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(RECIPE))
    try:
        yield {
            name: importlib.import_module(name)
            for name in ("compare", "compare_report", "findings", "heads", "projected", "scored")
        }
    finally:
        sys.path.remove(str(RECIPE))
        for name, module in list(sys.modules.items()):
            if str(RECIPE) in str(getattr(module, "__file__", "")):
                del sys.modules[name]


@pytest.fixture
def options(world, tmp_path):
    return ["--work", tmp_path / "work", "--model", world.model, "--database", world.database, "--pairs", 6,
            "--held-out", 2, "--real", 6, "--teacher-steps", 1, "--lpips-steps", 1, "--threads", 1]  # fmt: skip


def call(module, *arguments):
    module.main([str(argument) for argument in arguments])


def test_every_arm_is_trained_drawn_and_scored_once(scripts, options, tmp_path, capsys):
    compare, out = scripts["compare"], tmp_path / "results"
    small = (
        "loop.batch=2",
        "loop.micro_batch=2",
        "student.lora.rank=2",
        "discriminator.width=8",
        "loop.sample_every=0",
    )
    arms = ("student", "adapter", "lora", "wrong")
    run = [*options, "--results", out, "--arms", *arms, "--seeds", 0, 1, "--prompts", 4, "--steps", 2, "--set", *small]
    call(compare, *run)
    names = {"student", "adapter-0", "adapter-1", "lora-0", "lora-1", "wrong-0", "wrong-1"}
    assert {path.stem for path in out.glob("*.json")} == names
    facts = {name: json.loads((out / f"{name}.json").read_text()) for name in names}
    assert all(len(f["values"]) == 4 and f["group"] == "crcr" for f in facts.values())
    assert facts["lora-1"]["training"]["changes"] == ["student.adapter=none"] and facts["lora-1"]["seed"] == 1
    assert facts["adapter-0"]["training"]["stats"][-1]["step"] == 2 and facts["student"]["made_by"]["commit"]
    # Another seed is another run, and wrong neighbours are drawn with the adapter that was trained with right ones.
    weights = [(tmp_path / "work" / "runs" / f"adapter-{s}" / "export" / "adapter.safetensors") for s in (0, 1)]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    assert not (tmp_path / "work" / "runs" / "wrong-0").exists()
    # Run again, only what is missing is made, and is the same.
    kept = {name: (out / f"{name}.json").stat().st_mtime_ns for name in names - {"adapter-1"}}
    (out / "adapter-1.json").unlink()
    call(compare, *run)
    assert json.loads((out / "adapter-1.json").read_text())["values"] == facts["adapter-1"]["values"]
    assert kept == {name: (out / f"{name}.json").stat().st_mtime_ns for name in kept}
    call(scripts["compare_report"], "--results", out, "--images", tmp_path / "images")
    assert "| adapter and LoRA | 2 |" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"comparison.png", "comparison-training.png"}


def write(folder: Path, arm: str, seed: int | None, values: np.ndarray) -> None:
    facts = {
        "arm": arm,
        "seed": seed,
        "values": values.tolist(),
        "group": "cr" * (len(values) // 2),
        "first_prompt": "p",
    }
    facts |= {"made_by": {"commit": "0" * 40, "machine": "none"}} | ({} if seed is None else {"training": {}})
    (folder / f"{arm}-{seed}.json").write_text(json.dumps(facts))


def test_the_report_says_better_only_where_it_is(scripts, tmp_path):
    """Known differences: 0.1 on every rare prompt, noise of the training seeds alone, and nothing."""
    report, rng = scripts["compare_report"], np.random.default_rng(0)
    base = rng.uniform(0.2, 0.8, 200)
    rare = np.tile([0.0, 0.1], 100)
    for seed, shift in enumerate((0.0, 0.0, 0.0)):
        write(tmp_path, "lora", seed, base + shift)
        write(tmp_path, "adapter", seed, base + rare)
        # Every prompt moves together with the seed: many prompts make no certainty of three seeds.
        write(tmp_path, "wrong", seed, base + (-0.05, 0.0, 0.08)[seed])
    results = report.read(tmp_path)
    found = {group: report.difference(results["adapter"], results["lora"], group) for group in report.GROUPS}
    assert [found["common"].mean, found["common"].low, found["common"].high] == pytest.approx([0, 0, 0], abs=1e-9)
    assert [found["rare"].mean, found["rare"].low, found["rare"].high] == pytest.approx([0.1] * 3)
    assert found["all"].mean == pytest.approx(0.05) and 0.04 < found["all"].low < found["all"].high < 0.06
    luck = report.difference(results["wrong"], results["lora"], "all")
    assert luck.mean == pytest.approx(0.01) and luck.low < 0 < luck.high
    text = report.markdown(results)
    assert "| adapter and LoRA | +0.050" in text and text.count("| better |") == 1
    assert text.count("| no difference shown |") == 1
    write(tmp_path, "k-2", 0, base[:100])
    with pytest.raises(SystemExit, match="different prompts"):
        report.read(tmp_path)


def test_the_heads_are_measured_with_the_student_held_still(scripts, options, tmp_path, monkeypatch, capsys):
    heads, out = scripts["heads"], tmp_path / "heads"
    small = ("loop.batch=2", "loop.micro_batch=2", "discriminator.width=8", "student.lora.rank=2")
    monkeypatch.setattr(heads, "VARIANTS", {"one": small, "two": (*small, "discriminator.real=all")})
    call(heads, *options, "--results", out, "--steps", 2, "--variants", "one", "two")
    facts = json.loads((out / "two.json").read_text())
    assert facts["changes"][-1] == "discriminator.real=all" and set(facts["stats"][0]["d_heads"]) >= {"mid"}
    assert "| one |" in capsys.readouterr().out


def test_findings_are_measured_once_and_reported_from_their_numbers(scripts, world, tmp_path, monkeypatch, capsys):
    findings, out = scripts["findings"], tmp_path / "results"
    monkeypatch.setattr(scripts["scored"], "TIMED", 2)
    monkeypatch.setattr(scripts["projected"], "SCENES", 8)
    monkeypatch.setattr(scripts["projected"], "BATCH", 4)
    run = ["--work", tmp_path / "work", "--model", world.model, "--database", world.database, "--results", out,
           "--prompts", 2, "--sizes", 6, "--circles", 4, "--key-steps", 2, "--threads", 1]  # fmt: skip
    names = {cell.name for cell in findings.cells([6])}
    assert len(names) == len(findings.cells([6])) and "blend-slerp_per=token+w=0.8-own" in names
    wanted = [
        cell for cell in findings.cells([6]) if cell.system.startswith("slerp@w=0.8") and cell.question != "blend"
    ]
    monkeypatch.setattr(findings, "cells", lambda sizes: wanted)
    call(findings, *run, "--untimed")
    assert all("milliseconds" not in json.loads(path.read_text()) for path in out.glob("*.json"))
    call(findings, *run)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    facts = {(f["question"], f["database"]): f for f in (json.loads(path.read_text()) for path in kept)}
    assert {asked: f["pairs"] for asked, f in facts.items()} == {
        ("mode", "own"): 32, ("size", "6"): 6, ("wrong domain", "circles"): 4,
        ("keys", "own"): 32, ("keys", "projected"): 32,
    }  # fmt: skip
    assert Database.open(tmp_path / "work" / "database-projected").key_kind == "clip"
    assert all(f["milliseconds"]["p50"] > 0 and len(f["values"]) == 2 for f in facts.values())
    call(findings, *run)
    assert kept == {path: path.stat().st_mtime_ns for path in out.glob("*.json")}
    call(findings, "--report", "--results", out, "--image", tmp_path / "findings.png")
    said = capsys.readouterr().out
    assert "4 circles" in said and (tmp_path / "findings.png").stat().st_size > 0
