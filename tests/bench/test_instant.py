"""What tests/conftest.py does for a run that may be killed, or that loses its GPU."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KILLED = """
import os, time

def test_wrong():
    numbers = list(range(5))
    assert numbers == [], "the reason"

def test_killed():
    # In a parallel run this is a worker: the controller must be the one that dies.
    time.sleep(1)
    os.kill(os.getppid() if "PYTEST_XDIST_WORKER" in os.environ else os.getpid(), 9)
    time.sleep(30)
"""
BROKEN = """
import os, sys, types
import pytest

@pytest.mark.parametrize("n", range(6))
def test_one(n, monkeypatch):
    if n == 2:
        def lost():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=lost)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
    # As after an illegal access: everything fails from then on.
    assert not isinstance(sys.modules.get("torch"), types.SimpleNamespace), "poisoned"
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    counted: a count\n")
    monkeypatch.setenv("RAGTURBO_INSTANT", "1")
    return tmp_path


@pytest.mark.parametrize("workers", [[], ["-n", "1", "--dist", "worksteal"]], ids=["one process", "a worker"])
def test_a_failure_is_printed_though_the_run_is_killed_after_it(folder, run_pytest, workers):
    (folder / "test_it.py").write_text(KILLED)
    printed = run_pytest(workers, cwd=folder, code=-signal.SIGKILL)
    assert "FAILED test_it.py::test_wrong (call)" in printed and "the reason" in printed
    assert printed.count("FAILED") == 1 and "= FAILURES =" not in printed


def test_a_file_that_cannot_be_collected_is_printed(folder, run_pytest):
    (folder / "test_it.py").write_text("import a_package_nobody_has")
    printed = run_pytest([], cwd=folder, code=2)
    assert "FAILED test_it.py (collect)" in printed


def test_a_worker_that_lost_its_gpu_takes_no_other_tests_down(folder, run_pytest):
    (folder / "test_it.py").write_text(BROKEN)
    printed = run_pytest(["-n", "1", "--dist", "worksteal"], cwd=folder, code=1)
    assert "5 passed" in printed and "poisoned" in printed
    assert all(f"FAILED test_it.py::test_one[{n}]" not in printed for n in (0, 1, 3, 4, 5))


def test_a_run_without_workers_ends_with_its_gpu(folder, run_pytest):
    (folder / "test_it.py").write_text(BROKEN)
    printed = run_pytest([], cwd=folder, code=3)
    assert "2 passed" in printed and "the CUDA context was lost in test_it.py::test_one[2]" in printed
