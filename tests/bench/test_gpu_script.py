"""The GPU script without a GPU: every step's lines run, and no step can take the others with it."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ragturbo.bench import budgets, gpu_steps
from ragturbo.bench.context import context
from ragturbo.bench.gpu_steps import STEPS, Scale, measure

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
    found = json.loads(json.dumps(measure(name, Scale(rehearse=True)), default=str))
    known = {budget.key for budget in budgets.BUDGETS}
    assert set(found["measured"]) <= known and found["measured"] and "withheld" not in found
    assert all(value == value for value in found["measured"].values())
    # A rehearsal on a busy machine is noisy, and no card is asked.
    assert found["gpu_states"] == [] and all(flag.startswith("noise ") for flag in found["flags"])


@pytest.mark.parametrize("name", ["image", "compiled peer", "parts", "added", "tail"])
def test_what_is_wrong_has_no_time(name, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr("ragturbo.bench.peers.relative_error", lambda ours, theirs: 0.5)
    monkeypatch.setattr(gpu_steps, "relative_error", lambda ours, theirs: 0.5)
    monkeypatch.setattr(gpu_steps, "interleaved", lambda runs, rounds: pytest.fail("timed all the same"))
    found = measure(name, Scale(rehearse=True))
    assert found["measured"] == {} and "5.0e-01" in found["withheld"] and found["agreement"]


def test_a_step_says_that_the_card_was_held_back_or_its_times_drifted(monkeypatch):
    states = iter([{"reasons": ["idle"]}, {"reasons": ["power cap"]}, None])
    monkeypatch.setattr(gpu_steps, "gpu_state", lambda: next(states))

    def work(scale, look):
        look()
        return {"measured": {"unet_s": 1.0}, "noise": {"ours": 0.034, "theirs": 0.019}}

    monkeypatch.setitem(STEPS, "parts", work)
    found = measure("parts", Scale())
    assert found["flags"] == ["throttled: power cap", "noise 3.4% (ours)"] and len(found["gpu_states"]) == 3


def test_every_gpu_budget_but_training_has_its_step(monkeypatch):
    import inspect

    source = inspect.getsource(sys.modules["ragturbo.bench.gpu_steps"])
    for budget in budgets.BUDGETS:
        if budget.where == "gpu" and budget.key != "ladd_samples_per_s":
            assert f'"{budget.key}"' in source, budget.key


def step(name: str, code: str, box: float = 60.0, result: Path | None = None, needs: tuple[str, ...] = ()):
    return gpu.Step(name, [sys.executable, "-c", code], box, result, needs)


@pytest.fixture
def on_card(monkeypatch):
    """Records that say they were made on a card of this name."""

    def put(name: str) -> None:
        here = {**context(), "gpu": {"name": name}, "machine": name}
        monkeypatch.setattr("ragturbo.bench.context.context", lambda: here)

    return put


def given(out: Path, **result: Any) -> str:
    """The code of a step that leaves this result."""
    return f"open({str(out)!r}, 'w').write({json.dumps(result)!r})"


def test_a_step_that_fails_hangs_or_is_missing_costs_the_others_nothing(tmp_path, on_card):
    out = tmp_path / "good.json"
    write = f"import json; json.dump({{'measured': {{'unet_s': 0.003}}, 'more': 1}}, open({str(out)!r}, 'w'))"
    steps = [
        step("fails", "raise SystemExit('no such kernel')"),
        step("hangs", "import time; time.sleep(60)", box=6.0),
        step("lacks", "pass", needs=("a_package_nobody_has",)),
        step("works", write, result=out),
    ]
    on_card("NVIDIA H200")
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


def test_the_page_judges_what_the_budgets_card_measured_and_says_what_is_doubtful(tmp_path, on_card):
    out = tmp_path / "step.out"
    flags = {"works": ["noise 3.4% (ours)"], "others": ["throttled: power cap"]}
    steps = [
        step("works", given(out, measured={"unet_s": 3e-3}, flags=flags["works"]), result=out),
        step("others", given(out, measured={"adapter_s": 2e-4}, flags=flags["others"]), result=out),
        step("wrong", given(out, measured={}, withheld="latents 5.0e-01 from the reference's"), result=out),
        step("ended", f"open({str(out)!r}, 'w').write('{{')", result=out),
    ]

    def page(name: str) -> tuple[str, str]:
        on_card(name)
        gpu.run_part("engine", steps, tmp_path, 100.0, rehearsal=False, missing=[])
        text = gpu.summary(tmp_path)
        row = next(line for line in text.splitlines() if "UNet alone" in line)
        return text, row

    text, row = page("NVIDIA H200")
    assert "3.00 ms | met |" in row and "noise 3.4% (ours)" in row and "power cap" not in row
    assert "engine: wrong: no time: latents 5.0e-01" in text and "half written" in text
    assert "Flags: works: noise 3.4% (ours); others: throttled: power cap." in text
    text, row = page("NVIDIA H100 80GB HBM3")
    assert "3.00 ms" in row and "| met |" not in text and "not met" not in text


def test_a_figure_that_a_later_run_withholds_is_gone(tmp_path):
    out = tmp_path / "step.out"
    for result in ({"measured": {"unet_s": 3e-3}}, {"measured": {}, "withheld": "wrong"}):
        steps = [step("parts", given(out, **result), result=out)]
        gpu.run_part("engine", steps, tmp_path, 100.0, rehearsal=False, missing=[])
    assert json.loads((tmp_path / "engine.json").read_text())["measured"] == {}


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
    assert gpu.PART_SECONDS <= 480


@pytest.mark.parametrize("quick", [True, False])
def test_what_a_gpu_is_asked_for_is_planned_and_the_choices_go_into_one_folder(tmp_path, quick):
    options = argparse.Namespace(rehearse=False, results=tmp_path)
    planned = {s.name: s for part in gpu.PARTS for s in gpu.plan(part, options, quick, tmp_path)}
    wanted = {"kernel tests", "image", "parts", "attention", "tail", "added", "cold", "breakdown", "build"}
    assert wanted | ({"sanitizer", "tune", "fastest", "compiled peer"} if not quick else set()) <= set(planned)
    writers = {"attention", "tune", "fastest"} & set(planned)
    assert all(str(tmp_path.resolve() / "configs") in planned[name].command for name in writers)
    assert all(5 <= s.box <= gpu.PART_SECONDS for s in planned.values())
