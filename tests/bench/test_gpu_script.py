"""The GPU script without a GPU: its plan, and that no step affects the results of another."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, gpu_steps
from ragturbo.bench import budgets

ROOT = Path(__file__).resolve().parents[2]
FAULTS = ("hangs", "raises", "is killed", "is wrong")
# What a lent machine sends back at most.
FILES = 8


SETS = [name for names in gpu.SETS.values() for name in names]


def shell(text: str) -> list[str]:
    return ["/bin/sh", "-c", text]


def stand_in(step: Any, fault: str | None = None) -> Any:
    """A step whose shell command writes what a real step would, or fails in a given way."""
    key = {"image": "image_p50_s", "parts": "unet_s", "added": "retrieval_added_s"}.get(step.name, "cold_start_s")
    result: dict[str, Any] = {"measured": {key: 0.004}, "flags": []}
    if fault == "is wrong":
        result = {"measured": {}, "unverified": {key: 0.004}, "unverified_because": {key: "latents 5.0e-01 off"}}
    text = "true"
    if step.result is not None and step.result.suffix == ".json":
        # A step that is ended leaves the phases it had finished.
        text = f"echo {shlex.quote(json.dumps(result))} >{step.result}"
    text += {"hangs": "; sleep 60", "raises": "; echo no such kernel; exit 1", "is killed": "; kill -9 $$"}.get(
        fault or "", ""
    )
    return replace(step, command=shell(text), needs=(), box=0.6 if fault == "hangs" else 30.0)


@pytest.fixture
def plan(tmp_path: Path) -> dict[str, Any]:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    return gpu.plan(tmp_path / "results", scratch, rehearse=False)


def run(steps: list[Any], results: Path) -> dict[str, Any]:
    results.mkdir(exist_ok=True)
    gpu.run(steps, results, time.monotonic() + 60, rehearsal=False)
    return json.loads((results / "engine.json").read_text())


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SETS)
def test_whatever_happens_to_a_step_the_others_keep_their_results(tmp_path, plan, name, fault):
    whole = next(names for names in gpu.SETS.values() if name in names)
    found = run([stand_in(plan[n], fault if n == name else None) for n in whole], tmp_path / "results")
    outcome = found["steps"][name]["outcome"]
    assert {n for n in whole if found["steps"][n]["outcome"] == "done"} >= set(whole) - {name}
    measured = {n for n in whole if found["steps"][n].get("measured")}
    others = {n for n in whole if plan[n].result is not None and plan[n].result.suffix == ".json"} - {name}
    assert measured >= others
    summary = (tmp_path / "results" / "summary.md").read_text()
    if fault == "is wrong":
        assert plan[name].result is None or plan[name].result.suffix == ".jsonl" or "5.0e-01" in outcome
    else:
        expected = {"hangs": "out of time", "raises": "failed with 1", "is killed": "killed by signal 9"}[fault]
        assert outcome == expected and expected in summary
    if fault == "raises":
        assert "no such kernel" in found["steps"][name]["tail"]
        assert "no such kernel" in (tmp_path / "results" / "logs.txt").read_text()


def test_a_run_that_is_killed_leaves_what_was_finished_and_the_phases_of_the_step_it_was_in(tmp_path, plan):
    results = tmp_path / "results"
    results.mkdir()
    scratch = tmp_path / "scratch"
    left = {
        name: json.dumps({"measured": {key: 0.01}}) for name, key in (("parts", "unet_s"), ("image", "image_p50_s"))
    }
    commands = {name: f"echo {shlex.quote(text)} >{scratch}/{name}.json" for name, text in left.items()}
    commands["image"] += "; sleep 60"
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}]
from benchmarks import gpu
from pathlib import Path
steps = [gpu.Step(name, ["/bin/sh", "-c", text], 60.0, Path({str(scratch)!r}) / f"{{name}}.json")
         for name, text in {commands!r}.items()]
gpu.run(steps, Path({str(results)!r}), time.monotonic() + 60, rehearsal=False)
"""
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    record = results / "engine.json"
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            if record.is_file() and "image_p50_s" in json.loads(record.read_text())["measured"]:
                break
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    found = json.loads(record.read_text())
    assert found["measured"] == {"unet_s": 0.01, "image_p50_s": 0.01}
    assert found["steps"]["parts"]["outcome"] == "done" and found["steps"]["image"]["outcome"] == "running"


def test_steps_that_share_a_process_have_entries_and_figures_of_their_own(tmp_path, plan):
    folder = plan["together"].result
    left = {"image": {"image_p50_s": 0.01}, "parts": {"unet_s": 0.004}}
    text = f"mkdir {folder}; " + "; ".join(
        f"echo {shlex.quote(json.dumps({'measured': measured}))} >{folder}/{name}.json"
        for name, measured in left.items()
    )
    found = run([replace(plan["together"], command=shell(text + "; exit 1"), needs=())], tmp_path / "results")
    assert found["measured"] == {"image_p50_s": 0.01, "unet_s": 0.004}
    assert {name: step["outcome"] for name, step in found["steps"].items()} == dict.fromkeys(
        ("image", "parts", "together"), "failed with 1"
    )


def test_a_record_does_not_say_where_things_lay(tmp_path):
    text = f"in {ROOT}/benchmarks/gpu.py and {tempfile.gettempdir()}/ragturbo-x1/db"
    gpu.replace_json(tmp_path / "a.json", {"tail": text})
    assert json.loads((tmp_path / "a.json").read_text())["tail"] == "in benchmarks/gpu.py and db"


def test_a_step_that_needs_what_is_not_there_is_skipped_and_named(tmp_path, plan):
    step = replace(stand_in(plan["image"]), needs=("a_package_nobody_has",))
    found = run([step, stand_in(plan["parts"])], tmp_path / "results")
    assert found["steps"]["image"]["outcome"] == "skipped: a_package_nobody_has is not installed"
    assert found["steps"]["parts"]["outcome"] == "done"


def test_when_the_time_is_used_up_the_rest_is_skipped_and_said_so(tmp_path, plan):
    results = tmp_path / "results"
    results.mkdir()
    gpu.run([stand_in(plan["image"])], results, time.monotonic() + 1.0, rehearsal=False)
    found = json.loads((results / "engine.json").read_text())
    assert found["steps"]["image"]["outcome"] == "skipped: the run's time is used up"


def test_a_result_that_is_half_written_is_said_to_be_and_harms_nobody(tmp_path, plan):
    broken = replace(stand_in(plan["image"]), command=shell(f"echo '{{' >{plan['image'].result}"))
    found = run([broken, stand_in(plan["parts"])], tmp_path / "results")
    assert "its result cannot be read" in found["steps"]["image"]["outcome"]
    assert found["measured"] == {"unet_s": 0.004}


def test_children_that_a_step_leaves_behind_are_ended(tmp_path, plan):
    started = tmp_path / "child"
    step = replace(stand_in(plan["image"]), command=shell(f"(sleep 2; touch {started}) & exit 0"))
    assert run([step], tmp_path / "results")["steps"]["image"]["outcome"] == "done"
    time.sleep(2.5)
    assert not started.exists()


def test_an_interrupt_ends_the_step_that_runs(tmp_path, plan):
    started = tmp_path / "child"
    step = replace(stand_in(plan["image"]), command=shell(f"sleep 3; touch {started}"), result=None)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with (tmp_path / "log").open("w") as log, pytest.raises(KeyboardInterrupt):
        gpu.step_process.run(step, 60.0, log, cwd=ROOT, poll=interrupted)
    time.sleep(3.0)
    assert not started.exists()


def test_a_step_that_cannot_be_ended_does_not_hold_up_the_others(tmp_path, plan, monkeypatch):
    # Nothing ends the step, as inside a driver's call that does not return.
    monkeypatch.setattr(gpu.step_process.os, "killpg", lambda group, number: None)
    monkeypatch.setattr(gpu.step_process, "UNKILLABLE", 0.2)
    stuck = replace(stand_in(plan["image"]), command=shell("exec sleep 9 >/dev/null 2>&1"), box=0.5, result=None)
    found = run([stuck, stand_in(plan["parts"])], tmp_path / "results")
    assert "image was killed" in (tmp_path / "results" / "logs.txt").read_text()
    assert found["steps"]["image"]["outcome"] == "out of time" and found["steps"]["parts"]["outcome"] == "done"


def test_a_second_run_in_the_same_folder_keeps_the_first_ones_figures(tmp_path, plan):
    results = tmp_path / "results"
    first = run([stand_in(plan["image"])], results)
    second = run([stand_in(plan["parts"])], results)
    run([stand_in(plan["cold"])], results)
    assert json.loads((results / "engine-1.json").read_text()) == first
    assert json.loads((results / "engine-2.json").read_text()) == second
    summary = (results / "summary.md").read_text()
    assert summary.count("4.00 ms") == 2 or "no GPU" in summary


def test_a_file_that_is_no_result_costs_the_summary_alone(tmp_path, plan):
    results = tmp_path / "results"
    results.mkdir()
    (results / "notes.json").write_text("{}")
    assert run([stand_in(plan["image"])], results)["measured"] == {"image_p50_s": 0.004}
    assert "notes.json is no result" in (results / "summary.md").read_text()


def test_of_a_step_that_prints_without_end_the_log_keeps_head_and_tail(tmp_path, plan):
    step = replace(
        stand_in(plan["image"]), command=shell("echo the head; yes 0123456789 | head -c 5000000; echo the tail; exit 3")
    )
    run([step], tmp_path / "results")
    log = (tmp_path / "results" / "logs.txt").read_text()
    assert "the head" in log and "the tail" in log and len(log) < 300_000


@pytest.mark.parametrize("name", gpu.SETS)
def test_a_set_leaves_no_more_files_than_come_back(tmp_path, plan, name):
    left = {"summary.md", "logs.txt", "engine.json"}
    for step in (plan[n] for n in gpu.SETS[name]):
        left |= {"first_light.jsonl"} if step.name == "first-light" else set()
        left |= {"suite.json"} if step.result is not None and step.result.suffix == ".jsonl" else set()
        left |= {"configs/nvidia_h100_80gb_hbm3.json"} if "configs" in " ".join(step.command) else set()
        # A step's files are in scratch, and are merged.
        assert step.result is None or step.result.parent == tmp_path / "scratch"
    assert len(left) <= FILES


def test_what_one_step_measures_of_the_gpu_the_later_ones_take(tmp_path, plan):
    folder = str(tmp_path / "results" / "configs")
    assert all(step.environment["RAGTURBO_KERNEL_CONFIGS"] == folder for step in plan.values())
    writers = [plan[name] for name in ("attention", "upsampling", "tune", "fastest")]
    assert all(folder in step.command for step in writers)


def test_every_gpu_budget_has_a_step(plan):
    source = inspect.getsource(gpu_steps)
    for budget in budgets.BUDGETS:
        if budget.where == "gpu" and budget.key != "ladd_samples_per_s":
            assert f'"{budget.key}"' in source, budget.key
    assert {name.replace(" ", "-") for name in gpu_steps.STEPS} <= set(plan)


def test_an_unknown_step_is_refused_by_name():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "imagine"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "no step 'imagine'" in done.stderr and "first-light" in done.stderr
