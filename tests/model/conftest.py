"""Small real models, made once per run by tests/tiny.py (fixture `tiny`)."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ragturbo.model.bundle import Bundle


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def folders(tiny: ModuleType, tiny_sd21: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders by kind: sd21, sd15, and sd21 with the other prediction types."""
    root = tmp_path_factory.mktemp("models")
    made = {"sd21": tiny_sd21, "sd15": tiny.make_bundle(root / "sd15", "sd15")}
    for prediction in ("v_prediction", "sample"):
        made[prediction] = tiny.make_bundle(root / prediction, prediction_type=prediction)
    return made


@pytest.fixture(scope="session")
def bundle(tiny_sd21: Path) -> Bundle:
    """A model in the shape of sd-turbo on the CPU. Shared: tests that change a model load their own."""
    return Bundle.load(tiny_sd21, device="cpu")


@pytest.fixture
def folder(tiny_sd21: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(tiny_sd21, tmp_path / "model"))


@pytest.fixture(scope="session")
def unets(tiny: ModuleType) -> dict[str, Any]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return {kind: tiny.unet(kind) for kind in ("sd21", "sd15", "sdxl")}
