"""The C++ of ragturbo._native without Python, under the address, undefined-behaviour and thread sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
PARTS = ("crc32", "pool", "store", "mapped", "pinned")
SOURCES = [HERE / "checks.cpp", *(CSRC / f"{name}.cpp" for name in PARTS)]
SANITIZERS = {"asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"], "tsan": ["-fsanitize=thread"]}

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed: nothing to compile with")


def compile_cpp(target: Path, sources: list[Path], *flags: str) -> None:
    command = ["g++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread", *flags]
    done = subprocess.run([*command, *map(str, sources), "-ldl", "-o", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def without_randomisation() -> list[str]:
    """Thread sanitizer's shadow memory can collide with a randomised layout, which some containers cannot disable."""
    prefix = ["setarch", "-R"]
    allowed = shutil.which("setarch") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0
    return prefix if allowed else []


def run(command: list[str], **environment: str) -> str:
    command = [*without_randomisation(), *command]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_native_parts_are_clean_under(sanitizer: str, tmp_path: Path) -> None:
    checks = tmp_path / "checks"
    compile_cpp(checks, SOURCES, *SANITIZERS[sanitizer])
    assert "all checks passed" in run([str(checks), str(tmp_path)])

    # The page-locked arena talks to a driver that counts what it is given and aborts on misuse.
    driver = tmp_path / "driver"
    driver.mkdir()
    compile_cpp(driver / "libcuda.so.1", [HERE / "cuda_driver.cpp"], "-shared", "-fPIC")
    assert "all checks passed" in run([str(checks), str(tmp_path), "driver"], LD_LIBRARY_PATH=str(driver))
