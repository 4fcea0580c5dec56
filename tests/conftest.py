"""Fixtures every part shares: randomness that says its seed, and counts that are full only in `make test-long`."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
import subprocess
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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and (counts := [value for name, value in report.user_properties if name == "counted"]):
        _counted[report.nodeid] = {"counts": counts, "outcome": report.outcome, "seconds": round(report.duration, 1)}


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With RAGTURBO_COUNTS=file, what was counted, how often, from which seed and commit, test by test."""
    path = os.environ.get("RAGTURBO_COUNTS")
    if not path or hasattr(session.config, "workerinput"):
        return
    from ragturbo.bench import context

    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = bool(subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip())
    machine = {"machine": context.machine(), "cpu": context.cpu_model()}
    facts = {"seed": SEED, "commit": commit, "dirty": dirty, "full": LONG, **machine}
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


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """tests/tiny.py: small real models with random weights."""
    return _load("tiny")


@pytest.fixture(scope="session")
def tiny_sd21(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder in the shape of sd-turbo: distilled, one step."""
    return tiny.make_bundle(tmp_path_factory.mktemp("tiny") / "sd21")
