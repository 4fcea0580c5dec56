"""The GPU script without a GPU: every step's lines run, and no step can take the others with it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from ragturbo.bench import budgets
from ragturbo.bench.gpu_steps import STEPS, Scale

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("ragturbo_gpu_script", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = gpu
spec.loader.exec_module(gpu)
# A process of its own that imports everything: too long for every run of the tests.
OWN_PROCESS = {"cold"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in OWN_PROCESS else n for n in STEPS]
)  # fmt: skip
def test_every_line_of_a_step_runs_at_tiny_sizes(name):
    torch.set_num_threads(1)
    found = json.loads(json.dumps(STEPS[name](Scale(rehearse=True)), default=str))
    known = {budget.key for budget in budgets.BUDGETS}
    assert set(found["measured"]) <= known and found["measured"]
    assert all(value == value for value in found["measured"].values())


def test_every_gpu_budget_but_training_has_its_step(monkeypatch):
    import inspect

    source = inspect.getsource(sys.modules["ragturbo.bench.gpu_steps"])
    for budget in budgets.BUDGETS:
        if budget.where == "gpu" and budget.key != "ladd_samples_per_s":
            assert f'"{budget.key}"' in source, budget.key


def step(name: str, code: str, box: float = 60.0, result: Path | None = None, needs: tuple[str, ...] = ()):
    return gpu.Step(name, [sys.executable, "-c", code], box, result, needs)


def test_a_step_that_fails_hangs_or_is_missing_costs_the_others_nothing(tmp_path):
    out = tmp_path / "good.json"
    write = f"import json; json.dump({{'measured': {{'unet_s': 0.003}}, 'more': 1}}, open({str(out)!r}, 'w'))"
    steps = [
        step("fails", "raise SystemExit('no such kernel')"),
        step("hangs", "import time; time.sleep(60)", box=6.0),
        step("lacks", "pass", needs=("a_package_nobody_has",)),
        step("works", write, result=out),
    ]
    gpu.run_part("engine", steps, tmp_path, 100.0, rehearsal=False, missing=["scann"])
    found = json.loads((tmp_path / "engine.json").read_text())
    outcomes = {name: entry["outcome"] for name, entry in found["steps"].items()}
    assert outcomes["fails"] == "failed with 1" and "no such kernel" in found["steps"]["fails"]["tail"]
    assert outcomes["hangs"] == "out of time" and outcomes["works"] == "done"
    assert outcomes["lacks"] == "skipped: a_package_nobody_has is not installed"
    assert found["measured"] == {"unet_s": 0.003} and found["missing"] == ["scann"]
    out.unlink()
    page = gpu.summary(tmp_path)
    assert "3.00 ms | met" in page and "engine: hangs: out of time" in page


def test_a_part_ends_when_its_time_is_used_up(tmp_path):
    gpu.run_part("train", [step("late", "pass")], tmp_path, 1.0, rehearsal=True, missing=[])
    found = json.loads((tmp_path / "train.json").read_text())
    assert found["steps"]["late"]["outcome"] == "skipped: the part's time is used up"
    assert "A rehearsal" in gpu.summary(tmp_path) and "| met |" not in gpu.summary(tmp_path)


def test_suites_of_a_part_become_one_file_that_a_late_one_cannot_spoil(tmp_path, suite):
    data = json.loads(suite.read_text())
    steps = []
    for i, benchmark in enumerate(data["benchmarks"]):
        out = tmp_path / f"scratch-{i}.out"
        text = json.dumps({**data, "benchmarks": [benchmark]})
        steps.append(step(f"suite {i}", f"open({str(out)!r}, 'w').write({text!r})", result=out))
    steps.insert(1, step("suite late", "import time; time.sleep(60)", box=5.5))
    gpu.run_part("kernels", steps, tmp_path, 100.0, rehearsal=False, missing=[])
    merged = json.loads((tmp_path / "kernels-suite.json").read_text())
    assert [b["fullname"] for b in merged["benchmarks"]] == [b["fullname"] for b in data["benchmarks"]]
    assert "kernels: suite late: out of time" in gpu.summary(tmp_path)


def test_a_part_is_gone_on_with_in_the_same_sources_and_begun_anew_in_others(tmp_path, suite, monkeypatch):
    out, data = tmp_path / "found.out", json.loads(suite.read_text())
    first, second = data["benchmarks"][:2]

    def measured(name: str, benchmark: dict) -> None:
        text = json.dumps({**data, "benchmarks": [benchmark]})
        gpu.run_part("kernels", [step(name, f"open({str(out)!r}, 'w').write({text!r})", result=out)], tmp_path, 100.0,
                     rehearsal=False, missing=[])  # fmt: skip

    def found() -> tuple[list[str], list[str]]:
        steps = json.loads((tmp_path / "kernels.json").read_text())["steps"]
        merged = json.loads((tmp_path / "kernels-suite.json").read_text())["benchmarks"]
        return list(steps), [b["fullname"] for b in merged]

    measured("suite one", first), measured("suite two", second)
    assert found() == (["suite one", "suite two"], [first["fullname"], second["fullname"]])
    data["machine_info"]["ragturbo"]["sources"] = "0123456789ab"
    monkeypatch.setattr("ragturbo.bench.context.context", lambda: data["machine_info"]["ragturbo"])
    measured("suite two", second)
    assert found() == (["suite two"], [second["fullname"]])


def test_the_parts_fit_their_time_and_at_most_eight_files(tmp_path):
    # And the tiles and winners of this GPU, in a folder of their own.
    files = {"summary.md", "configs/nvidia_h200.json"}
    for part in gpu.PARTS:
        options = argparse.Namespace(rehearse=False, results=tmp_path)
        files.add(f"{part}.json")
        for planned in gpu.plan(part, options, False, tmp_path):
            suite = "kernels-suite.json" if part == "kernels" else "suite.json"
            files |= {suite} if planned.name.startswith("suite ") else set()
            # What a step leaves lies in scratch, and is merged.
            assert planned.result is None or planned.result.parent == tmp_path
    assert len(files) <= 8, files
    assert gpu.PART_SECONDS <= 480 and sum(gpu.QUICK_SHARES.values()) <= 480
