"""The cost model reproduces what was measured before it predicts; the predictions are committed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from benchmarks import cost_model
from benchmarks.roofline import MACHINES

LISTS = json.loads((cost_model.RESULTS / "operations.json").read_text("utf-8"))
STAGES = ("text", "encode", "adapter", "decode", "vae", "unet", "device")


def test_what_was_measured_is_reproduced():
    checked = {row["figure"]: row for row in cost_model.check(LISTS)}
    assert set(STAGES) < set(checked) and len(checked) >= 14
    for figure, row in checked.items():
        assert abs(row["error"]) < (0.06 if figure in STAGES else 0.15), row


def test_the_listed_operations_have_the_counted_flops():
    """Counted on eager modules: folding and fused products take some away, and none is added."""
    counted = json.loads((cost_model.RESULTS.parent / "stage_counts.json").read_text("utf-8"))["stages"]
    for rows in LISTS.values():
        for stage in ("encode", "decode", "vae"):
            listed = sum(row["flops"] * row["count"] for row in rows if row["stage"] == stage)
            assert listed == pytest.approx(counted[stage]["flops"]["float16"], rel=0.02)


def test_faster_memory_and_early_launches_never_slow_a_stage_down():
    rows = list(LISTS.values())[-1]
    h100, h200 = (cost_model.predict(rows, cost_model.GPUS[name], old=False, early=True) for name in ("H100", "H200"))
    late = cost_model.predict(rows, cost_model.GPUS["H200"], old=False, early=False)
    for stage, seconds in h200["stages"].items():
        assert seconds <= h100["stages"][stage] and seconds <= late["stages"][stage]


def test_no_product_is_faster_than_the_datasheet():
    gpu = cost_model.GPUS["H200"]
    for m, n, k in ((64, 1280, 1280), (4096, 320, 2880), (262144, 128, 1152), (1, 1, 64)):
        assert gpu.product(m, n, k) >= 2 * m * n * k / MACHINES["H200"].flops


def test_the_committed_predictions_name_their_error_and_commit():
    record = json.loads((cost_model.RESULTS / "predictions.json").read_text("utf-8"))
    assert record["operations"] in LISTS and record["context"]["commit"]
    assert record["largest_error"] == pytest.approx(max(abs(row["error"]) for row in record["checked"]))
    for name in cost_model.GPUS:
        assert record["predicted"][name]["image"] > record["predicted"][name]["device"] > 0


@pytest.mark.slow
def test_the_operations_can_be_listed_again(tmp_path):
    out = tmp_path / "operations.json"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.operations", "--out", str(out), "--commit", "now"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=cost_model.RESULTS.parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    (rows,) = json.loads(out.read_text("utf-8")).values()
    assert {row["stage"] for row in rows} >= {"text", "encode", "adapter", "decode", "vae"}
