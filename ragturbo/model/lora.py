"""The decoder's LoRA, in peft's folder format: adapter_config.json and adapter_model.safetensors.

Loading does not need peft: each layer computes with a merged copy of its weight, so that inference has no overhead, and
keeps the base weight for unloading. Training uses peft; its layers can be saved and removed here, too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import ModelError
from ragturbo.model.find import LORA
from ragturbo.model.ties import base_layer
from ragturbo.model.weights import read_safetensors, write_safetensors

FOLDER = LORA
FOLDER = LORA
NAME = "decoder"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# The prefix of peft's PeftModel in its files.
_PREFIX = "base_model.model."
# The attribute of a UNet with a loaded LoRA that holds its configuration.
_LOADED = "decoder_lora"
_MERGE = "Merge it into the UNet's decoder with peft first, or train a plain LoRA."
# Settings with which a LoRA is not just base + scale·B·A.
_NOT_PLAIN = (
    "use_dora", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "kasa_config",
)  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _INITS}


class LoRALayer(nn.Module):
    """Replaces `base_layer`, with the LoRA merged into the weight. The names in its state dict are those of peft."""

    weight: Tensor

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base_layer = base
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.register_buffer("weight", torch.empty_like(base.weight), persistent=False)

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    @torch.no_grad()
    def merge(self, a: Tensor, b: Tensor, scale: float) -> None:
        """a: (r, in, …), b: (out, r, …). The merged weight keeps its address, which captured graphs read."""
        base = self.base_layer.weight
        for layers, value in ((self.lora_A, a), (self.lora_B, b)):
            parameter = nn.Parameter(value.to(base.device, base.dtype), requires_grad=False)
            layers[NAME] = nn.ParameterDict({"weight": parameter})
        a, b = a.to(base.device).float(), b.to(base.device).float()
        delta = (b.flatten(1) @ a.flatten(1)).view(base.shape)
        self.weight.copy_(base.float() + scale * delta)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if isinstance(base, nn.Linear):
            return F.linear(x, self.weight, base.bias)
        return F.conv2d(x, self.weight, base.bias, base.stride, base.padding, base.dilation, base.groups)


def has_lora(unet: Any) -> bool:
    return getattr(unet, _LOADED, None) is not None or NAME in (getattr(unet, "peft_config", None) or {})


def load_lora(unet: Any, folder: str | Path) -> None:
    """Load the LoRA of `folder` into a diffusers UNet, in place of its present one.

    Raises:
        ModelError: it is not a plain LoRA of this UNet's decoder. The UNet is unchanged then.
    """
    folder = Path(folder)
    state = {name.removeprefix(_PREFIX): value for name, value in read_safetensors(folder / WEIGHTS).items()}
    if outside := sorted(name for name in state if not name.startswith("up_blocks.")):
        raise ModelError(
            f"{folder} changes more than the decoder ({outside[0]}): cached features would become invalid. Fuse it "
            "into a diffusers pipeline (pipe.fuse_lora(), pipe.unload_lora_weights()), and give pipe as the model"
        )
    config = _config(folder)
    pairs = _pairs(state, folder)
    for path, (a, b) in pairs.items():
        _check_fits(unet, path, a, b, folder)
    remove_lora(unet, keep=pairs)
    for path, (a, b) in pairs.items():
        layer = unet.get_submodule(path)
        if not isinstance(layer, LoRALayer):
            layer = LoRALayer(layer)
            unet.set_submodule(path, layer)
        rank = len(a)
        layer.merge(a, b, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))
    setattr(unet, _LOADED, config)


def save_lora(unet: Any, folder: str | Path) -> None:
    folder = Path(folder)
    state = {name: value for name, value in unet.state_dict().items() if ".lora_A." in name or ".lora_B." in name}
    write_safetensors(folder / WEIGHTS, {_PREFIX + name.replace(f".{NAME}.", "."): v for name, v in state.items()})
    loaded = getattr(unet, _LOADED, None)
    if loaded is None:
        unet.peft_config[NAME].save_pretrained(str(folder))
    else:
        (folder / CONFIG).write_text(json.dumps(loaded, indent=2) + "\n", "utf-8")


def remove_lora(unet: Any, keep: Container[str] = ()) -> None:
    """Restore the base layers, except below the LoRALayers with a path in `keep`."""
    for path, module in list(unet.named_modules()):
        # peft's layers have these attributes, too.
        if hasattr(module, "base_layer") and hasattr(module, "lora_A"):
            if not (isinstance(module, LoRALayer) and path in keep):
                unet.set_submodule(path, module.base_layer)
    # Deleted, not emptied: even an empty one makes peft warn of a second adapter.
    if getattr(unet, "peft_config", None) is not None:
        del unet.peft_config
    setattr(unet, _LOADED, None)


def _pairs(state: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module path."""
    suffixes = (".lora_A.weight", ".lora_B.weight")
    if odd := sorted(name for name in state if not name.endswith(suffixes)):
        raise ModelError(f"{folder} is not a plain LoRA: it holds {odd[0]}. {_MERGE}")
    a, b = ({n.removesuffix(suffix): v for n, v in state.items() if n.endswith(suffix)} for suffix in suffixes)
    if single := sorted(a.keys() ^ b.keys()):
        raise ModelError(f"{folder} is incomplete: {single[0]} has only one of lora_A and lora_B")
    return {path: (a[path], b[path]) for path in sorted(a)}


def _check_fits(unet: Any, path: str, a: Tensor, b: Tensor, folder: Path) -> None:
    misfit = f"{folder} does not fit this UNet"
    try:
        module = unet.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{misfit}, which has no {path}") from None
    base = base_layer(module)
    if not isinstance(base, (nn.Linear, nn.Conv2d)):
        raise ModelError(f"{misfit}: {path} is a {type(base).__name__}")
    rank, shape = len(a), tuple(base.weight.shape)
    if a.shape[1:] != shape[1:] or b.flatten(1).shape != (shape[0], rank):
        shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
        raise ModelError(f"{misfit}: {path} has a weight of {shape}, its LoRA has {shapes}")


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        float(config["lora_alpha"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} is not a LoRA configuration: {error!r}") from error
    for name, value in config.items():
        if value not in _PLAIN[name] if name in _PLAIN else value and name in _NOT_PLAIN:
            raise ModelError(f"{path} is not a plain LoRA: {name}={value!r}. {_MERGE}")
    return config
