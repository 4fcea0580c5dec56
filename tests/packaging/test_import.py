"""`import ragturbo` is light, and works without each part that may be absent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LIGHT = """
import sys
import ragturbo
heavy = {"torch", "triton", "scann", "diffusers", "transformers", "numpy", "PIL", "pyarrow", "ragturbo._native"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
from ragturbo import generate
from ragturbo.generate import Generator
import ragturbo.generate as g
assert callable(generate) and g is generate is ragturbo.generate and Generator is ragturbo.Generator
assert ragturbo.Output and ragturbo.Neighbor
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""

# None in sys.modules makes `import name` fail as it does where the package is not installed.
BLOCK = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
"""

INFO = """
from ragturbo import errors, ops, retrieval, info
facts = info.collect()
text = "\\n".join(info.lines(facts))
path = {"triton": "Triton kernels", "scann": "ScaNN search", "xformers": "xformers attention",
        "ragturbo._native": "native module"}[sys.argv[1]]
assert not facts["fast_paths"][path]["on"] and sys.argv[1] in facts["fast_paths"][path]["detail"], text
"""

IMAGE = """
from ragturbo import Generator
with Generator.from_pretrained(sys.argv[2], device="cpu") as gen:
    assert gen("a red circle", seed=1, height=64, width=64).images[0].size == (64, 64)
"""

PARTS = ["triton", "scann", "xformers", "ragturbo._native"]


def python(script: str, *arguments: str) -> None:
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_importing_ragturbo_imports_nothing_heavy() -> None:
    python(LIGHT)


@pytest.mark.parametrize("name", PARTS)
def test_ragturbo_works_and_says_what_is_off_without(name: str) -> None:
    python(BLOCK + INFO, name)


def test_an_image_is_made_without_any_of_them(tiny_sd21: Path) -> None:
    python(BLOCK + IMAGE, ",".join(PARTS), str(tiny_sd21))
