"""What a measurement says about where it was made."""

from __future__ import annotations

import json

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
