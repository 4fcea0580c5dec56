"""The first image of a known architecture needs neither diffusers nor transformers, whose import takes seconds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FIRST = """
import sys
from ragturbo import Generator
with Generator.from_pretrained(sys.argv[1], device="cpu") as gen:
    assert gen("a red circle", seed=1).images[0].size[0] > 0
slow = "diffusers transformers accelerate peft huggingface_hub torch._dynamo sympy pandas scann"
assert not set(slow.split()) & set(sys.modules), set(slow.split()) & set(sys.modules)
"""


@pytest.mark.parametrize("name", ["shapes", "tiny"])
def test_the_first_image_imports_neither_library(name: str, tiny_sd21: Path, tmp_path: Path) -> None:
    model = str(tiny_sd21) if name == "tiny" else name
    done = subprocess.run([sys.executable, "-c", FIRST, model], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
