"""One small breakdown for all tests, and results made from a real run of the suites."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def record() -> dict[str, Any]:
    """A breakdown at rehearsal size: every line of it, on a CPU."""
    from ragturbo.bench.breakdown import Settings, breakdown

    torch.set_num_threads(1)
    settings = Settings("rehearsal", "cpu", prompts=4, teacher_prompts=1, teacher_steps=3, pairs=40, keys=120)
    # As it will be read: through JSON.
    return json.loads(json.dumps(breakdown(settings)))


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw JSON of two real benchmarks, run as a user runs them."""
    out = tmp_path_factory.mktemp("suite") / "suite.json"
    files = ["benchmarks/test_bench_stages.py", "benchmarks/test_bench_scaled_residual.py"]
    chosen = ["-m", "quick", "-k", "tokenize or scaled_residual or test_stage[text]"]
    run_pytest([*files, *chosen, "--benchmark-only", "--benchmark-max-time=0.02", f"--benchmark-json={out}"])
    return out


def run_pytest(arguments: list[str], *, cwd: Path = ROOT, code: int = 0) -> str:
    # A worker's variables would tell the child that it is one of several, where nothing is timed.
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-2000:]
    # pytest-benchmark warns on stderr.
    return done.stdout + done.stderr


@pytest.fixture(name="run_pytest", scope="session")
def run_pytest_fixture() -> Any:
    return run_pytest
