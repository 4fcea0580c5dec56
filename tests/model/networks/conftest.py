"""Saved models beside diffusers' and transformers' own classes of them."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from ragturbo.model.find import resolve
from ragturbo.model.networks.load import KINDS, load_network

PARTS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}


def of_library(kind: str, path: Path, dtype: torch.dtype) -> Any:
    model = getattr(import_module(KINDS[kind].library), kind).from_pretrained(path, local_files_only=True)
    return model.to(dtype).eval()


@pytest.fixture(scope="session")
def models(folders: dict[str, Path], tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of models by name: SD 1.5's and SD 2.1's structures, the embedded model, and one with uneven options."""
    odd = tiny.make_bundle(
        tmp_path_factory.mktemp("odd") / "model",
        seed=3,
        layers_per_block=(1, 2, 1, 1),
        transformer_layers_per_block=(1, 2, 1, 1),
        attention_head_dim=(2, 4, 4, 4),
        center_input_sample=True,
        flip_sin_to_cos=False,
        freq_shift=1,
        mid_block_scale_factor=1.5,
        downsample_padding=0,
        norm_eps=1e-4,
        act_fn="gelu",
    )
    return {"sd15": folders["sd15"], "sd21": folders["sd21"], "shapes": resolve("shapes"), "odd": odd}


@pytest.fixture(params=["sd15", "sd21", "shapes", "odd"])
def model(request: pytest.FixtureRequest, models: dict[str, Path]) -> Path:
    return models[request.param]


def pair(folder: Path, part: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A part of a model as this package's network and as the library's."""
    kind = PARTS[part]
    ours = load_network(kind, folder / part, None, dtype)
    assert ours is not None and type(ours).__module__.startswith("ragturbo.")
    theirs = of_library(kind, folder / part, dtype)
    assert type(theirs).__module__.split(".")[0] == KINDS[kind].library
    # Copied to memory of the same alignment: CPU kernels may sum in another order if it differs.
    for network in (ours, theirs):
        for parameter in network.parameters():
            parameter.data = parameter.data.clone()
    return ours, theirs


@pytest.fixture(name="pair")
def _pair() -> Any:
    return pair
