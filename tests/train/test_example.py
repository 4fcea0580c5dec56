"""examples/train_adapter.py: from nothing to an adapter by commands, here with few samples and steps."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_adapter.py"
SMALL = ["--pairs", "16", "--pictures", "4", "--steps", "3", "--batch", "4", "--prompts", "4"]


@pytest.fixture(scope="module")
def example():
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("train_adapter", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.timeout(300)
def test_the_example_goes_from_nothing_to_an_adapter_and_continues_after_a_kill(example, tmp_path, monkeypatch, capfd):
    out = tmp_path / "first"

    def killed(*arguments):
        raise KeyboardInterrupt

    original = example.measure
    monkeypatch.setattr(example, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        example.main(["--out", str(out), *SMALL])
    # The recipe: every command as a user types it.
    printed = capfd.readouterr().out
    for command in ("db build", "data teacher", "data relabel", "data encode", "data neighbors", "data lpips"):
        assert f"$ ragturbo {command} " in printed
    assert "$ ragturbo train shapes --out " in printed
    made = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors") if "export" not in path.parts}
    monkeypatch.setattr(example, "measure", original)
    example.main(["--out", str(out), *SMALL])
    # The samples, the checkpoint and the rest were kept.
    assert made == {path: path.stat().st_mtime_ns for path in made}
    printed = capfd.readouterr().out
    assert f"$ ragturbo train --out {out / 'run'} --resume" in printed and "ragturbo generate " in printed
    result = json.loads((out / "result.json").read_text())
    assert result["resumed"] and len(result["losses, first and last"]["hspace"]) == 2
    assert {score["count"] for score in result["scores"].values()} == {4}
    assert (out / "run" / "export" / "adapter.safetensors").is_file()
    assert np.asarray(Image.open(out / "grid.png")).ndim == 3
    with pytest.raises(SystemExit, match="use those, or another --out"):
        example.main(["--out", str(out), *SMALL, "--steps", "9"])
