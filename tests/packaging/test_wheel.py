"""The contents, requirements and name of a wheel, and the three settings of the native module."""

from __future__ import annotations

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

BUILD = ("wheel", "--no-build-isolation", "--no-deps", "-v")


def build_wheel(project: Path, folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    command = [sys.executable, "-m", "pip", *BUILD, "-w", str(folder), "."]
    # `build/lib` would carry one wheel's files into the next.
    shutil.rmtree(project / "build", ignore_errors=True)
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, env={**os.environ, **environment})
    return done, list(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(project: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    done, wheels = build_wheel(project, tmp_path_factory.mktemp("wheel"), RAGTURBO_NATIVE="off")
    assert done.returncode == 0 and len(wheels) == 1, done.stdout + done.stderr
    return zipfile.ZipFile(wheels[0])


def test_the_wheels_top_level_is_ragturbo_alone(wheel: zipfile.ZipFile) -> None:
    """A package named `kernels` would be mistaken for Hugging Face's by transformers and diffusers."""
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"ragturbo"}
    assert len(top) == 2


def test_the_wheel_holds_every_module_and_every_data_file(wheel: zipfile.ZipFile, project: Path) -> None:
    names = set(wheel.namelist())
    package = project / "ragturbo"
    wanted = {f"ragturbo/{path.relative_to(package).as_posix()}" for path in package.rglob("*") if path.is_file()}
    wanted |= {f"ragturbo/kernels/{path.relative_to(project / 'kernels').as_posix()}"
               for path in (project / "kernels").rglob("*") if path.is_file()}  # fmt: skip
    wanted = {name for name in wanted if "/__pycache__/" not in name}
    assert wanted - names == set()
    assert "ragturbo/py.typed" in names and "ragturbo/kernels/__init__.py" in names
    assert any(name.endswith("licenses/LICENSE") or name.endswith("dist-info/LICENSE") for name in names)


def test_the_metadata_ask_for_lower_bounds_only(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    facts = email.message_from_bytes(wheel.read(name))
    requirements = facts.get_all("Requires-Dist") or []
    assert len(requirements) > 10
    for requirement in requirements:
        bounds = requirement.split(";")[0]
        assert not re.search(r"==|~=|<|!=", bounds), f"{requirement}: an upper bound or a pin"
    needed = {re.split(r"[><=;\[ ]", r)[0].lower() for r in requirements if "extra ==" not in r}
    assert {
        "torch",
        "diffusers",
        "transformers",
        "safetensors",
        "numpy",
        "pillow",
        "pyarrow",
        "typer",
        "rich",
    } <= needed
    assert {"triton", "scann"} <= needed
    assert {"train", "eval", "bench", "xformers", "serve", "ray", "dev"} == set(facts.get_all("Provides-Extra") or [])
    assert facts["Requires-Python"] == ">=3.10"
    assert "Apache-2.0" in (facts["License"], facts["License-Expression"])


def test_off_is_noted_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    assert not [name for name in wheel.namelist() if name.endswith((".so", ".pyd"))]
    assert wheel.read("ragturbo/_native_off.txt").decode() == "RAGTURBO_NATIVE=off when ragturbo was installed\n"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler under any name that setuptools tries."""
    for variable in ("CC", "CXX", "LDSHARED", "LDCXXSHARED"):
        monkeypatch.setenv(variable, str(tmp_path / "no-such-compiler"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))


def test_a_missing_compiler_is_a_warning_and_a_pure_python_install(no_compiler, project: Path, tmp_path: Path) -> None:
    done, wheels = build_wheel(project, tmp_path, RAGTURBO_NATIVE="auto")
    assert done.returncode == 0 and len(wheels) == 1, done.stdout + done.stderr
    assert "ragturbo._native was not built" in done.stdout + done.stderr
    with zipfile.ZipFile(wheels[0]) as built:
        assert not [name for name in built.namelist() if name.endswith(".so")]
        assert "no-such-compiler" in built.read("ragturbo/_native_off.txt").decode()


def test_a_missing_compiler_is_an_error_where_one_is_required(no_compiler, project: Path, tmp_path: Path) -> None:
    done, wheels = build_wheel(project, tmp_path, RAGTURBO_NATIVE="require")
    assert done.returncode != 0 and wheels == []
    assert "no-such-compiler" in done.stdout + done.stderr


def test_an_unknown_setting_is_refused_with_the_known_ones(project: Path, tmp_path: Path) -> None:
    done, wheels = build_wheel(project, tmp_path, RAGTURBO_NATIVE="yes")
    assert done.returncode != 0 and wheels == []
    assert "RAGTURBO_NATIVE='yes': give auto, require or off" in done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here, so the native module is rightly off")
def test_where_there_is_a_compiler_this_installation_has_the_native_module() -> None:
    from ragturbo.info import native_reason

    assert native_reason() in ("", "RAGTURBO_NATIVE=off when ragturbo was installed")
