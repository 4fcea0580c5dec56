"""First light without a GPU: its checks at small sizes, and a check that raises, hangs or breaks the context."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "first_light.py"


def run(script: Path, out: Path, *arguments: str) -> dict[str, dict]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script), "--rehearse", "--out", str(out), "--seconds", "500", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({line["check"] for line in lines}) == len(lines), done.stderr
    return {line["check"]: line for line in lines}


def test_checks_of_every_kind_run_and_pass_at_small_sizes(tmp_path):
    kinds = ("versions", "case slerp, b1", "case group_norm", "gather", "topk", "adapter", "form none",
             "form adapter, one graph", "pairs group_norm")  # fmt: skip
    found = run(SCRIPT, tmp_path / "out.jsonl", "--only", *kinds)
    assert all(line["ok"] for line in found.values()), found
    assert all(any(name.startswith(kind) for name in found) for kind in kinds)
    case = next(line for name, line in found.items() if name.startswith("case slerp"))
    assert case["relative_error"] <= case["within"] < case["control"] / 10


@pytest.mark.slow
def test_all_of_it_runs_at_small_sizes(tmp_path):
    found = run(SCRIPT, tmp_path / "out.jsonl")
    assert all(line["ok"] for line in found.values()), found


WRONG = """
import os, signal, sys, time
sys.argv[0] = __file__
from benchmarks import first_light as light

def good(bench): return {}
def raises(bench): raise ValueError("no such kernel")
def breaks(bench): raise RuntimeError("an illegal memory access was encountered")
def hangs(bench): time.sleep(600)
def wrong(bench): return {"ok": False, "say": "error 5.0e-01"}

light.HANGS_AFTER = 0.4
# A rehearsal has no context to lose: after this error it says it had.
light.Runner._usable = lambda self: "breaks" not in self._checks[self._now].name
light.plan = lambda rehearse: [light.Check(f.__name__ + str(i), f)
                               for i, f in enumerate([good, raises, good, breaks, good, hangs, good, wrong, good])]
sys.exit(light.main())
"""


def test_a_check_that_raises_hangs_is_wrong_or_breaks_the_context_costs_no_other(tmp_path):
    script = tmp_path / "wrong.py"
    script.write_text(WRONG)
    found = run(script, tmp_path / "out.jsonl")
    assert [name for name, line in found.items() if line["ok"]] == ["good0", "good2", "good4", "good6", "good8"]
    assert found["raises1"]["error"] == "ValueError: no such kernel" and "raises" in found["raises1"]["traceback"]
    assert "illegal memory access" in found["breaks3"]["error"]
    assert found["hangs5"]["error"].startswith("hung") and "hangs" in found["hangs5"]["traceback"]
    assert found["wrong7"]["say"] == "error 5.0e-01"


def test_what_comes_after_the_time_is_used_up_is_said_to_be_skipped(tmp_path):
    found = run(SCRIPT, tmp_path / "out.jsonl", "--only", "versions", "case slerp, b1", "--seconds", "0")
    assert all(line["skipped"] == "the time was used up" for line in found.values())
