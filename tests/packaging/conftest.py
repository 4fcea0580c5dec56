"""A copy of the project to build from, so that no test leaves anything in the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout") / "project"
    copy.mkdir()
    unwanted = shutil.ignore_patterns("__pycache__", "*.so", "_native_off.txt")
    for name in ("ragturbo", "kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=unwanted)
    for name in ("pyproject.toml", "setup.py", "LICENSE", "CHANGELOG.md", "MANIFEST.in", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.fixture(scope="session")
def pip() -> Callable[..., str]:
    """Runs pip and returns its output; it must succeed, and nothing is fetched."""

    def run(*arguments: str | Path, cwd: Path, python: str | Path = sys.executable, **environment: str) -> str:
        command = [str(python), "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run
