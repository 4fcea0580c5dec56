"""Shared fixtures: random generators whose seed is reported, and counts that are full only in `make test-long`."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

# Without a GPU Triton's kernels run in its interpreter, which must be decided before anything imports triton.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

LONG = os.environ.get("RAGTURBO_LONG") == "1"
SEED = int(os.environ.get("RAGTURBO_SEED") or secrets.randbits(32))
# Worker processes of a parallel run, and children that tests start, share the controller's seed.
os.environ["RAGTURBO_SEED"] = str(SEED)


def pytest_report_header() -> str:
    return f"ragturbo: seed {SEED} (RAGTURBO_SEED={SEED} repeats it), {'full' if LONG else 'a tenth of the'} counts"


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """A generator that differs from run to run and from test to test, and is repeatable by the seed in the header."""
    return np.random.default_rng([SEED, *request.node.nodeid.encode()])


@pytest.fixture
def long_count(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """`long_count(200)` is 200 in `make test-long` and a tenth of it in `make test`."""

    def count(full: int) -> int:
        taken = full if LONG else max(1, full // 10)
        # A property travels from a worker to the controller, which writes the record.
        request.node.user_properties.append(("counted", taken))
        return taken

    return count


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m counted` is every test with a count that only `make test-long` runs in full."""
    for item in items:
        if "long_count" in getattr(item, "fixturenames", ()):
            item.add_marker("counted")


_counted: dict[str, dict[str, object]] = {}
# With RAGTURBO_INSTANT=1 a failure is printed as it happens: pytest prints them at the end, which a run that is killed
# does not reach. One of a parallel run's workers has no terminal; the controller prints what they report.
INSTANT = os.environ.get("RAGTURBO_INSTANT") == "1" and "PYTEST_XDIST_WORKER" not in os.environ
INSTANT_LINES = 60


def print_failure(report: pytest.TestReport | pytest.CollectReport) -> None:
    lines = [f"FAILED {report.nodeid} ({report.when})", *report.longreprtext.splitlines()[-INSTANT_LINES:]]
    print("\n" + "\n".join(lines), flush=True)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if INSTANT and report.failed:
        print_failure(report)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        if INSTANT:
            print_failure(report)
        leave_a_broken_gpu(report.nodeid)
    if report.when == "call" and (counts := [value for name, value in report.user_properties if name == "counted"]):
        _counted[report.nodeid] = {"counts": counts, "outcome": report.outcome, "seconds": round(report.duration, 1)}


def leave_a_broken_gpu(nodeid: str) -> None:
    """Ends a process whose CUDA context is lost: every test after an illegal access would fail in it as well.

    pytest-xdist starts another worker in its place; without it, the run ends.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            # The report of the failure is on its way by now. No clean-up: it would fail in CUDA too.
            os._exit(3)
        pytest.exit(f"the CUDA context was lost in {nodeid}: {error}", returncode=3)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With RAGTURBO_COUNTS=file, what was counted, how often, from which seed and commit, test by test."""
    path = os.environ.get("RAGTURBO_COUNTS")
    if not path or hasattr(session.config, "workerinput"):
        return
    from ragturbo import machine

    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
    host = {"machine": machine.kind(), "cpu": machine.cpu_model()}
    facts = {"seed": SEED, "commit": commit, "dirty": dirty, "full": LONG, **host}
    # A part may be run again alone: the record keeps what other runs have left, each test with its own facts.
    place = Path(path)
    known = json.loads(place.read_text("utf-8"))["tests"] if place.is_file() else {}
    known |= {name: {**found, **facts} for name, found in _counted.items()}
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"tests": dict(sorted(known.items()))}, indent=2) + "\n", "utf-8")


def _load(name: str) -> ModuleType:
    """A module beside this file: test folders are no packages, so it is loaded by its path."""
    spec = importlib.util.spec_from_file_location(f"ragturbo_tests_{name}", Path(__file__).with_name(f"{name}.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_WITHOUT_TORCH = """
import json, sys
from ragturbo.cli import main
answers = []
for line in json.loads(sys.argv.pop()):
    sys.argv[1:] = line
    try:
        main()
    except SystemExit as stop:
        answers.append([stop.code, "torch" in sys.modules])
    print("--", file=sys.stderr)
print(json.dumps(answers))
"""


@pytest.fixture(scope="session")
def answers_without_torch() -> Callable[[list[list[str]], Path], list[str]]:
    """Run wrong command lines in one process, check that each fails without importing torch, and return what stderr
    said of each."""

    def run(lines: list[list[str]], folder: Path) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", _WITHOUT_TORCH, json.dumps(lines)],
            capture_output=True, text=True, cwd=folder, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        answers = json.loads(done.stdout.splitlines()[-1])
        said = done.stderr.split("--\n")[:-1]
        assert len(answers) == len(said) == len(lines)
        for line, (code, torch), words in zip(lines, answers, said, strict=True):
            assert code in (2, 3) and not torch, (line, code, torch, words)
        return said

    return run


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py: small real models with random weights."""
    return _load("tiny")


@pytest.fixture(scope="session")
def single_file() -> Callable[[Path], dict[str, object]]:
    """tests/single_file.py: the weights of a diffusers folder as in an original single-file checkpoint."""
    return _load("single_file").single_file


@pytest.fixture(scope="session")
def tiny_sd21(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in the shape of sd-turbo: distilled, one step."""
    return tiny.make_bundle(tmp_path_factory.mktemp("tiny") / "sd21")
