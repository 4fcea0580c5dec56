"""Every kernel at its main shapes, compiled without a GPU: registers, spills, vector loads, exact division."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
# One dtype per target in `make test`; all combinations in `make test-long`.
TARGETS = [(80, "bfloat16"), (89, "float32"), (90, "float16")]
# SiLU uses the fast division; the cases include the same kernels without SiLU.
SILU = ("group_norm", "group_norm_apply")
# Kernels bound by their loads.
WIDE = (
    "bias_residual", "cross_attention", "gather_rows", "group_norm", "group_norm_apply", "group_norm_partial", "linear",
    "scaled_residual", "scan_keys",
)  # fmt: skip
# Kernels that spend their time in loops. Outside the innermost loop they load one flag a neighbour.
LOOPS = (
    "cross_attention",
    "group_norm",
    "group_norm_partial",
    "linear",
    "project_cross_attention",
    "scan_keys",
    "scan_keys_together",
)
# Kernels of gradients are in no graph.
BACKWARD = ("cross_attention_dkv", "cross_attention_dq", "scaled_residual_backward", "slerp_blend_backward")
REST = [
    (sm, dtype) for sm in (80, 89, 90) for dtype in ("bfloat16", "float16", "float32") if (sm, dtype) not in TARGETS
]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("sm, dtype", [*TARGETS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in REST)])
def test_no_kernel_spills_or_asks_for_more_shared_memory_than_there_is(sm, dtype, tmp_path, pytestconfig, capsys):
    # In a subprocess, because in this one the kernels are interpreted. Triton caches what is compiled.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
    command = [sys.executable, "-m", "benchmarks.compile_offline", "--sm", str(sm), "--dtype", dtype]
    command += ["--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    with capsys.disabled():
        print(f"\n{done.stdout}")
    assert done.returncode == 0, done.stderr[-3000:] or done.stdout
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["context"]["packages"]["triton"]
    rows = record["rows"]
    kernels = {row["kernel"] for row in rows}
    assert kernels >= {
        "bias_residual", "cross_attention", "cross_attention_dkv", "cross_attention_dq", "gather_rows", "geglu",
        "group_norm", "group_norm_apply", "group_norm_merge", "group_norm_partial", "layer_norm", "linear",
        "merge_lists", "project_cross_attention", "scaled_residual", "scaled_residual_backward", "scan_keys",
        "slerp_blend", "slerp_blend_backward", "slerp_sums", "to_uint8",
    }  # fmt: skip
    for row in rows:
        assert row["stack"] == row["local"] == 0, row
        assert row["registers"] <= 255, row
        # The other tests run in the interpreter, which rounds every division and square root correctly.
        activated = row["kernel"] in SILU and not any("no SiLU" in case for case in row["cases"])
        assert row["inexact"] == (["div.full"] if activated else []), row
        if row["kernel"] in WIDE:
            assert row["load_bytes"] == 16, row
        if row["kernel"] in LOOPS:
            # JSON has strings as keys.
            assert set(row["code"]["loop_loads"]) <= {"16"}, row
            assert set(row["code"]["outer_loads"]) <= {"16", "1"}, row
        pdl = row["code"]["waits"], row["code"]["triggers"]
        assert pdl == ((1, 1) if sm >= 90 and row["kernel"] not in BACKWARD else (0, 0)), row
        assert row["code"]["early"] == 0, row
        if row["kernel"] in ("linear", "project_cross_attention"):
            assert (row["code"]["prefetches"] > 0) == (sm >= 90), row
        if row["kernel"] in ("scan_keys", "scan_keys_together"):
            # With fewer programs a multiprocessor, nothing is loaded while a program searches.
            assert row["resident"] >= 3, row
        if dtype != "float32" and row["kernel"] in ("linear", "cross_attention", "project_cross_attention"):
            assert row["matrix"] in ("mma.sync", "wgmma"), row
