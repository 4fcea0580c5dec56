"""The description of a machine and checkout that is stored with a measurement."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ragturbo import machine


def test_a_description_names_machine_software_and_commit():
    found = json.loads(json.dumps(machine.describe()))
    assert found["cpu"] and found["cores"] >= 1 and found["python"].count(".") == 2
    assert found["packages"]["torch"] and len(found["sources"]) == 12
    assert set(found) >= {"commit", "dirty", "machine", "gpu", "kernel", "threads"}


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setenv("RAGTURBO_COMMIT", "abc123")
    assert machine.checkout()["commit"] == "abc123" and machine.checkout()["dirty"] is None


@pytest.mark.parametrize("name", [name for _, name, _ in machine.REASONS])
def test_every_clock_reason_is_named_and_only_slow_ones_are_flagged(name):
    bit, _, slow = next(r for r in machine.REASONS if r[1] == name)
    assert machine.reason_names(bit | 0x1000) == [name]
    assert machine.throttled([None, {"reasons": [name]}, {"reasons": None}]) == ([name] if slow else [])


def test_a_machine_without_a_gpu_says_why(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.no_gpu_reason() and machine.gpu() is None


def test_a_recorded_command_reveals_no_absolute_path(monkeypatch, tmp_path):
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [
        "/opt/x/bin/ragturbo", "benchmarks/", f"--out={here}/results/a.json", "-o", "../b.json",
        f"{tmp_path}/My files/c d.json", "--k=not 1/2 x", "a/../b", "/", "~/model",
    ])  # fmt: skip
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    recorded = machine.command()
    assert recorded.startswith("ragturbo benchmarks/ --out=results/a.json -o b.json ")
    assert "'c d.json'" in recorded and "My files" not in recorded and "not 1/2 x" in recorded and "a/../b" in recorded
    assert str(tmp_path) not in recorded and "/opt" not in recorded and str(Path.home()) not in recorded


def test_a_module_run_with_m_is_recorded_as_such(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="pytest.__main__"))
    monkeypatch.setattr(sys, "argv", ["/x/pytest/__main__.py", "-q"])
    assert machine.command() == "python -m pytest -q"


def test_a_description_holds_the_command_and_the_thread_settings(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAGTURBO_BENCH_THREADS", raising=False)
    found = machine.describe.__wrapped__()
    assert found["command"] == machine.command() and found["environment"] == {"OMP_NUM_THREADS": "1"}
