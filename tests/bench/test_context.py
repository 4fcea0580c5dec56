"""What a measurement says about where it was made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from ragturbo.bench import context


def test_a_context_names_machine_software_and_commit():
    found = json.loads(json.dumps(context.context()))
    assert found["cpu"] and found["cores"] >= 1 and found["python"].count(".") == 2
    assert found["packages"]["torch"] and len(found["sources"]) == 12
    assert set(found) >= {"commit", "dirty", "machine", "gpu", "kernel", "threads"}


def test_a_copy_without_git_takes_its_commit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(context, "ROOT", tmp_path)
    monkeypatch.setenv("RAGTURBO_COMMIT", "abc123")
    assert context.checkout()["commit"] == "abc123" and context.checkout()["dirty"] is None


@pytest.mark.parametrize("name", [name for _, name, _ in context.REASONS])
def test_every_reason_a_driver_gives_is_named_and_only_slow_ones_are_flagged(name):
    bit, _, slow = next(r for r in context.REASONS if r[1] == name)
    assert context.reason_names(bit | 0x1000) == [name]
    assert context.throttled([None, {"reasons": [name]}, {"reasons": None}]) == ([name] if slow else [])


def test_a_machine_without_a_gpu_says_why(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert context.no_gpu_reason() and context.gpu() is None


def test_a_command_is_as_typed_but_tells_no_folder_of_the_machine(monkeypatch, tmp_path):
    here = tmp_path / "work"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(sys, "argv", [
        "/opt/x/bin/ragturbo", "benchmarks/", f"--out={here}/results/a.json", "-o", "../b.json",
        f"{tmp_path}/My files/c d.json", "--k=not 1/2 x", "a/../b", "/", "~/model",
    ])  # fmt: skip
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)
    told = context.command()
    assert told.startswith("ragturbo benchmarks/ --out=results/a.json -o b.json ")
    assert "'c d.json'" in told and "My files" not in told and "not 1/2 x" in told and "a/../b" in told
    assert str(tmp_path) not in told and "/opt" not in told and str(Path.home()) not in told


def test_a_module_is_named_as_it_was_started(monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", SimpleNamespace(name="pytest.__main__"))
    monkeypatch.setattr(sys, "argv", ["/x/pytest/__main__.py", "-q"])
    assert context.command() == "python -m pytest -q"


def test_a_context_holds_the_command_and_the_threads_asked_for(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAGTURBO_BENCH_THREADS", raising=False)
    found = context.context.__wrapped__()
    assert found["command"] == context.command() and found["environment"] == {"OMP_NUM_THREADS": "1"}
