"""Ceilings: measured once for many processes, and never taken from another machine."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import ceilings as module
from benchmarks.ceilings import ceilings, measured


@pytest.fixture
def counted(monkeypatch):
    """Count the measurements instead of measuring; each call simulates a process of its own."""
    made: list[str] = []

    def count(device, quick=False):
        made.append(device)
        return {"bytes_per_s": float(len(made))}

    monkeypatch.setattr(module, "measured", count)
    return made, ceilings.__wrapped__


def test_a_second_process_reads_what_the_first_has_measured(counted, monkeypatch, tmp_path):
    made, fresh = counted
    monkeypatch.setenv("RAGTURBO_CEILINGS", str(tmp_path / "new" / "ceilings.json"))
    assert fresh("cpu") == fresh("cpu") == {"bytes_per_s": 1.0} and made == ["cpu"]
    # The atomic write leaves no other file.
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["ceilings.json"]
    # The ceilings of a rehearsal are neither stored nor read.
    assert fresh("cpu", True) == {"bytes_per_s": 2.0} and fresh("cpu") == {"bytes_per_s": 1.0}


@pytest.mark.parametrize("change", [{"cpu": "another"}, {"threads": 99}, {"torch": "1.0"}])
def test_another_machines_ceilings_are_measured_again(counted, monkeypatch, tmp_path, change):
    made, fresh = counted
    path = tmp_path / "ceilings.json"
    monkeypatch.setenv("RAGTURBO_CEILINGS", str(path))
    fresh("cpu")
    stored = json.loads(path.read_text())
    stored["cpu"]["made_on"] |= change
    path.write_text(json.dumps(stored))
    assert fresh("cpu") == {"bytes_per_s": 2.0} and made == ["cpu", "cpu"]
    assert fresh("cpu") == {"bytes_per_s": 2.0}


@pytest.mark.parametrize("damaged", ["", "{", "[]", "null"])
def test_a_damaged_file_is_written_anew(counted, monkeypatch, tmp_path, damaged):
    made, fresh = counted
    path = tmp_path / "ceilings.json"
    path.write_text(damaged)
    monkeypatch.setenv("RAGTURBO_CEILINGS", str(path))
    assert fresh("cpu") == fresh("cpu") == {"bytes_per_s": 1.0} and len(made) == 1


def test_one_gpus_ceilings_are_not_anothers(counted, monkeypatch, tmp_path):
    made, fresh = counted
    monkeypatch.setenv("RAGTURBO_CEILINGS", str(tmp_path / "ceilings.json"))
    names = iter(["NVIDIA H100", "NVIDIA H100", "NVIDIA H200"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: next(names))
    assert fresh("cuda") == fresh("cuda") == {"bytes_per_s": 1.0}
    assert fresh("cuda") == {"bytes_per_s": 2.0} and made == ["cuda", "cuda"]


def test_without_a_file_they_are_measured(monkeypatch):
    monkeypatch.delenv("RAGTURBO_CEILINGS", raising=False)
    found = measured("cpu", quick=True)
    assert found["bytes_per_s"] > 0 and found["flops_per_s"]["float32"] > 0 and found["link_bytes_per_s"] is None
