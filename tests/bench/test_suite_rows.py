"""A suite that is killed keeps the rows it had finished."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from benchmarks.suite_rows import append, rows_to_json

ROOT = Path(__file__).resolve().parents[2]
OP = """
import os, pytest, torch

@pytest.mark.parametrize("n", [64, 512])
def test_right(measure, n):
    x = torch.randn(n)
    measure(torch.sin, inputs=[(x,), (x + 1,)], cost={"bytes": 8 * n, "flops": n}, dtype=x.dtype, device="cpu")

def test_measured_and_then_found_wrong(benchmark):
    benchmark.pedantic(lambda: None)
    assert os.environ.get("SPARE")

@pytest.mark.compiled
def test_killed(benchmark):
    os.kill(os.getpid(), 9)
"""
LOST = """
import torch

def test_before(benchmark):
    benchmark.pedantic(lambda: None)

def test_lost(benchmark):
    def lost():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = (lambda: True), lost
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_after(benchmark):
    benchmark.pedantic(lambda: None)
"""


@pytest.fixture
def folder(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "test_bench_op.py").write_text(OP)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\naddopts = --strict-markers\n")
    return tmp_path


ARGUMENTS = ["--benchmark-only", "--benchmark-max-time=0.02", "--benchmark-json=out.json"]


def test_rows_of_a_killed_suite_are_those_that_had_passed(folder, run_pytest):
    (folder / "out.jsonl").write_text("of another run\n")
    run_pytest(ARGUMENTS, cwd=folder, code=-signal.SIGKILL)
    assert not (folder / "out.json").exists()
    found = rows_to_json(folder / "out.jsonl")
    assert found is not None and [row["name"] for row in found["benchmarks"]] == ["test_right[64]", "test_right[512]"]
    assert found["machine_info"]["ragturbo"]["cpu"] and found["datetime"] and found["wall_s"] > 0
    assert found["ceilings"]["cpu"]["bytes_per_s"] > 0
    (name, text), *others = found["failed"].items()
    assert name.endswith("::test_measured_and_then_found_wrong") and "SPARE" in text and not others


def test_they_are_what_the_whole_suite_writes(folder, run_pytest, monkeypatch):
    monkeypatch.setenv("RAGTURBO_CEILINGS", str(folder / "ceilings.json"))
    monkeypatch.setenv("SPARE", "1")
    monkeypatch.setenv("RAGTURBO_ROWS", str(folder / "kept" / "rows"))
    # `compiled` is registered, so that what is slow to compile can be left out.
    run_pytest([*ARGUMENTS, "-m", "not compiled"], cwd=folder)
    whole, found = json.loads((folder / "out.json").read_text()), rows_to_json(folder / "kept" / "rows")
    assert found is not None and not (folder / "out.jsonl").exists()
    assert found["benchmarks"] == whole["benchmarks"] and len(found["benchmarks"]) == 3
    assert found["ceilings"] == whole["ceilings"]
    assert found["machine_info"]["ragturbo"] == whole["machine_info"]["ragturbo"]


def test_a_suite_ends_with_its_gpu_and_prints_why(folder, run_pytest, monkeypatch):
    monkeypatch.setenv("RAGTURBO_INSTANT", "1")
    (folder / "test_bench_op.py").write_text(LOST)
    printed = run_pytest(["--benchmark-json=out.json"], cwd=folder, code=2)
    found = rows_to_json(folder / "out.jsonl")
    assert found is not None and [row["name"] for row in found["benchmarks"]] == ["test_before"]
    assert len(found["failed"]) == 1 and "the CUDA context was lost in test_bench_op.py::test_lost" in printed
    assert printed.index("FAILED test_bench_op.py::test_lost (call)") < printed.index("= FAILURES =")


def test_several_suites_in_one_file_and_half_a_line(tmp_path):
    path = tmp_path / "rows"
    assert rows_to_json(path) is None
    append(path, machine_info={"ragturbo": {}}, datetime="a")
    assert rows_to_json(path) is None
    append(path, benchmark={"fullname": "x", "stats": 1}, ceilings={"cpu": 1}, wall_s=1.0)
    append(path, benchmark={"fullname": "y"}, ceilings={})
    append(path, machine_info={"ragturbo": {}}, datetime="b")
    append(path, benchmark={"fullname": "x", "stats": 2}, ceilings={"cuda": 2}, wall_s=3.0)
    with path.open("a") as file:
        file.write('{"benchmark": {"fullname": "z", "sta')
    assert rows_to_json(path) == {
        "machine_info": {"ragturbo": {}}, "datetime": "b", "wall_s": 3.0, "ceilings": {"cpu": 1, "cuda": 2},
        "benchmarks": [{"fullname": "x", "stats": 2}, {"fullname": "y"}],
    }  # fmt: skip
