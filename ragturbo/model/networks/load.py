"""Make a network of a folder with config.json and one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ragturbo.errors import ModelError
from ragturbo.model.find import read_json
from ragturbo.model.networks import autoencoder, autoencoder_tiny, clip_text, unet
from ragturbo.model.networks.config import Options
from ragturbo.model.networks.library_class import Network
from ragturbo.model.networks.skeleton import Skeleton
from ragturbo.model.weights import read_safetensors


@dataclass(frozen=True)
class Kind:
    make: type[Network]
    options: Options
    stem: str
    """Of the file of weights, as the library names it."""

    @property
    def library(self) -> str:
        return self.make.LIBRARY


_DIFFUSERS = "diffusion_pytorch_model"
KINDS = {
    kind.make.__name__: kind
    for kind in (
        Kind(unet.UNet2DConditionModel, unet.OPTIONS, _DIFFUSERS),
        Kind(autoencoder.AutoencoderKL, autoencoder.OPTIONS, _DIFFUSERS),
        Kind(autoencoder_tiny.AutoencoderTiny, autoencoder_tiny.OPTIONS, _DIFFUSERS),
        Kind(clip_text.CLIPTextModel, clip_text.OPTIONS, "model"),
    )
}
# Old names of the layers of an autoencoder's attention.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_network(kind: str, path: Path, variant: str | None, dtype: torch.dtype) -> Network | None:
    """Load a network in eval mode, without gradients, as a view of the file.

    Args:
        kind: a name in KINDS.
        variant: of the weights, such as "fp16"; None: those without one.
        dtype: of the weights.

    Returns:
        None if the library's own class is needed: the configuration or the weights are not exactly those of `kind`.
    """
    known = KINDS[kind]
    file = path / f"{known.stem}{'' if variant is None else f'.{variant}'}.safetensors"
    try:
        config = known.options.read(read_json(path / "config.json"))
        if config is None or not file.is_file():
            return None
        config["_name_or_path"] = str(path)
        with Skeleton():
            network = known.make(config)
    # A value that the class cannot take: the library's error names it.
    except (ModelError, ValueError, TypeError, ZeroDivisionError, IndexError, RuntimeError):
        return None
    state = {_present_name(kind, name): value for name, value in read_safetensors(file).items()}
    if kind == "CLIPTextModel":
        # Saved by old versions.
        state.pop("embeddings.position_ids", None)
    return network.requires_grad_(False).eval() if _fill(network, state, dtype) else None


def _present_name(kind: str, name: str) -> str:
    if kind == "CLIPTextModel":
        # transformers 5 dropped this prefix.
        return name.removeprefix("text_model.")
    if kind == "AutoencoderKL" and ".attentions." in name:
        layer, _, tensor = name.rpartition(".")
        parent, _, last = layer.rpartition(".")
        return f"{parent}.{_OLD_ATTENTION.get(last, last)}.{tensor}"
    return name


def _fill(network: nn.Module, state: Mapping[str, Tensor], dtype: torch.dtype) -> bool:
    """Set all parameters. False if `state` has other names, shapes or kinds of numbers."""
    parameters: dict[str, tuple[Any, str, Tensor]] = {}
    for path, module in network.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                parameters[f"{path}.{name}" if path else name] = module, name, parameter
    if parameters.keys() != state.keys():
        return False
    for name, (module, own_name, parameter) in parameters.items():
        value = state[name]
        if value.shape != parameter.shape or not value.is_floating_point():
            return False
        module._parameters[own_name] = nn.Parameter(value.to(dtype), requires_grad=False)
    return True
