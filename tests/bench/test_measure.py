"""The fixture all benchmarks share: context in the record, no time for a wrong op, no GPU row without a GPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OP = """
import pytest, torch

def test_right(measure):
    x = torch.randn(512)
    measure(torch.sin, inputs=[(x,), (x + 1,)], verify=lambda: None, cost={"bytes": 4096, "flops": 512}, dtype=x.dtype,
            device="cpu", sizes={"n": 512})

def test_wrong(measure):
    def verify():
        raise AssertionError("it computes something else")
    measure(lambda: None, verify=verify, device="cpu")

@pytest.mark.gpu
def test_on_a_gpu(measure):
    measure(lambda: None)
"""


@pytest.fixture(scope="module")
def ran(run_pytest, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    shutil.copy(ROOT / "benchmarks" / "conftest.py", folder)
    (folder / "test_bench_op.py").write_text(OP)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    printed = run_pytest(["-rs", "--benchmark-only", "--benchmark-max-time=0.02", "--benchmark-json=out.json"],
                         cwd=folder, code=1)  # fmt: skip
    return printed, json.loads((folder / "out.json").read_text())


def test_a_wrong_op_has_no_time(ran):
    printed, data = ran
    assert "it computes something else" in printed
    assert [b["name"] for b in data["benchmarks"] if b["stats"]["rounds"]] == ["test_right"]


def test_a_record_says_what_where_and_how_much(ran):
    _, data = ran
    info = data["benchmarks"][0]["extra_info"]
    assert info["op"] == "op" and info["dtype"] == "float32" and info["sizes"] == {"n": 512}
    assert set(info["seconds"]) >= {"p50", "p95", "p99"} and info["bytes"] == 4096 and info["flops"] == 512
    assert info["fraction_of_roofline"] == pytest.approx(info["floor_s"] / info["seconds"]["p50"])
    assert info["rounds"] == data["benchmarks"][0]["stats"]["rounds"]
    assert (info["noise"] > 0.02) == any(flag.startswith("noise") for flag in info["flags"])
    assert data["machine_info"]["ragturbo"]["cpu"] and "node" not in data["machine_info"]
    assert data["ceilings"]["cpu"]["bytes_per_s"] > 0 and "data" not in data["benchmarks"][0]["stats"]


def test_a_gpu_row_is_skipped_with_the_reason(ran):
    import torch

    if not torch.cuda.is_available():
        assert "needs a GPU: torch" in ran[0]


def test_a_comparison_with_another_gpu_warns(ran, run_pytest, tmp_path):
    _, data = ran
    shutil.copy(ROOT / "benchmarks" / "conftest.py", tmp_path)
    (tmp_path / "test_bench_op.py").write_text(OP)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    run = ["-k", "test_right", "--benchmark-only", "--benchmark-max-time=0.02", "--benchmark-compare=other.json"]
    (tmp_path / "other.json").write_text(json.dumps(data))
    assert "cannot be compared" not in run_pytest(run, cwd=tmp_path)
    data = json.loads(json.dumps(data))
    data["machine_info"]["ragturbo"]["gpu"] = {"name": "NVIDIA GPU of another kind"}
    (tmp_path / "other.json").write_text(json.dumps(data))
    printed = " ".join(run_pytest(run, cwd=tmp_path).split())
    assert "made on NVIDIA GPU of another kind, this one on" in printed and "cannot be compared" in printed


def test_a_suite_run_as_users_run_it_leaves_a_whole_record(suite: Path):
    data = json.loads(suite.read_text())
    assert {b["extra_info"]["op"] for b in data["benchmarks"]} >= {"stage.tokenize", "scaled_residual"}
    assert all(b["extra_info"]["seconds"]["p50"] > 0 for b in data["benchmarks"])
