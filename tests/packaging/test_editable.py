"""The editable install, from inside and outside the root, and the trap of a root folder named `kernels`.

transformers and diffusers probe for Hugging Face's `kernels` by name: ours must never be found under it from outside
the root, and must not be mistaken for it where the root itself is on sys.path.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

PROBE = """
import importlib.util, os, sys
from pathlib import Path
import ragturbo, ragturbo.kernels

root = Path(sys.argv[1])
assert Path(ragturbo.__file__).parent == root / "ragturbo", ragturbo.__file__
assert Path(ragturbo.kernels.__file__).parent == root / "kernels", ragturbo.kernels.__file__
spec = importlib.util.find_spec("kernels")
if os.getcwd() != str(root):
    assert spec is None or not str(spec.origin).startswith(str(root)), spec
else:
    # `python -c` puts the root on sys.path, and the folder is found: it must not pass for the other package.
    assert spec is not None
    from diffusers.utils.import_utils import is_kernels_available as diffusers_sees
    from transformers.utils.import_utils import is_kernels_available as transformers_sees
    assert not diffusers_sees() and not transformers_sees()
"""


def environment_without_ragturbo(folder: Path) -> Path:
    """A virtual environment with this one's packages but not its editable ragturbo (a .pth in a .pth is not read)."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    Path(site, "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_an_editable_install_works_from(inside: bool, pip, project: Path, tmp_path: Path) -> None:
    python = environment_without_ragturbo(tmp_path / "venv")
    where = project if inside else tmp_path
    pip(
        "install", "--no-build-isolation", "--no-deps", "-e", "." if inside else project,
        cwd=where, python=python, RAGTURBO_NATIVE="off",
    )  # fmt: skip
    subprocess.run([python, "-c", PROBE, str(project)], cwd=tmp_path, check=True)
    subprocess.run([tmp_path / "venv/bin/ragturbo", "--version"], cwd=tmp_path, check=True)


def test_inside_the_root_our_kernels_are_not_taken_for_hugging_faces() -> None:
    root = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", PROBE, str(root)], cwd=root, check=True)


def test_kernels_are_of_the_packages_version() -> None:
    import ragturbo
    import ragturbo.kernels

    assert ragturbo.kernels.__version__ == ragturbo.__version__
