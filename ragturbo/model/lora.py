"""The decoder's LoRA, in peft's own folder format: adapter_config.json and adapter_model.safetensors.

Loading needs no peft: each layer computes with a merged copy of its weight, so that an image pays nothing for the LoRA,
and keeps the base to come back to. Training is peft's; what it put into a UNet is saved and taken out here as well.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo.errors import ModelError
from ragturbo.model.weights import read_safetensors, refuse_pickle, write_safetensors

FOLDER = "decoder_lora"
NAME = "decoder"
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
# peft's PeftModel writes its weights under its own wrapper's name.
_PREFIX = "base_model.model."
_HELD = "decoder_lora"
_MERGE = "Merge it into the UNet's decoder with peft first, or train a plain one."
# What makes more of a LoRA than base + scale·B·A where it is set.
_MORE = (
    "use_dora", "alpha_pattern", "fan_in_fan_out", "lora_bias", "use_qalora", "use_bdlora", "layer_replication",
    "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "kasa_config",
)  # fmt: skip
_INITS = (True, False, "gaussian", "eva", "orthogonal")
_PLAIN = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": _INITS}


class LoRALayer(nn.Module):
    """A linear layer or convolution in the place of `base_layer`, with the LoRA merged into its weight. What
    state_dict holds is named as peft names it."""

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
        """a: (r, in, …), b: (out, r, …). Into the same memory each time: a captured graph reads it there."""
        base = self.base_layer.weight
        for layers, value in ((self.lora_A, a), (self.lora_B, b)):
            held = nn.Parameter(value.to(base.device, base.dtype), requires_grad=False)
            layers[NAME] = nn.ParameterDict({"weight": held})
        a, b = a.to(base.device).float(), b.to(base.device).float()
        delta = (b.flatten(1) @ a.flatten(1)).view(base.shape)
        self.weight.copy_(base.float() + scale * delta)

    def forward(self, x: Tensor) -> Tensor:
        base = self.base_layer
        if isinstance(base, nn.Linear):
            return F.linear(x, self.weight, base.bias)
        return F.conv2d(x, self.weight, base.bias, base.stride, base.padding, base.dilation, base.groups)


def has_lora(unet: Any) -> bool:
    return getattr(unet, _HELD, None) is not None or NAME in (getattr(unet, "peft_config", None) or {})


def load_lora(unet: Any, folder: str | Path) -> None:
    """Puts the LoRA of `folder` into a diffusers UNet, in place of the one it has. It may touch the decoder only."""
    folder = Path(folder)
    state = {name.removeprefix(_PREFIX): value for name, value in read_safetensors(_weights(folder)).items()}
    if outside := sorted(name for name in state if not name.startswith("up_blocks.")):
        raise ModelError(
            f"{folder} changes more than the decoder ({outside[0]}): cached features would no longer be the model's own"
        )
    config = _config(folder)
    pairs = _pairs(state, folder)
    for path, (a, b) in pairs.items():
        _check_fits(unet, path, a, b, folder)
    # Nothing has changed so far: a LoRA that does not fit leaves the one before in force.
    for path, module in list(unet.named_modules()):
        if path not in pairs or not isinstance(module, LoRALayer):
            _unwrap(unet, path, module)
    for path, (a, b) in pairs.items():
        layer = unet.get_submodule(path)
        if not isinstance(layer, LoRALayer):
            layer = LoRALayer(layer)
            unet.set_submodule(path, layer)
        rank = len(a)
        layer.merge(a, b, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank))
    _forget_peft(unet)
    setattr(unet, _HELD, config)


def save_lora(unet: Any, folder: str | Path) -> None:
    folder = Path(folder)
    state = {name: value for name, value in unet.state_dict().items() if ".lora_A." in name or ".lora_B." in name}
    write_safetensors(folder / WEIGHTS, {_PREFIX + name.replace(f".{NAME}.", "."): v for name, v in state.items()})
    held = getattr(unet, _HELD, None)
    if held is None:
        unet.peft_config[NAME].save_pretrained(str(folder))
    else:
        (folder / CONFIG).write_text(json.dumps(held, indent=2) + "\n", "utf-8")


def remove_lora(unet: Any) -> None:
    """Puts the base layers back in their places."""
    for path, module in list(unet.named_modules()):
        _unwrap(unet, path, module)
    _forget_peft(unet)
    setattr(unet, _HELD, None)


def _unwrap(unet: Any, path: str, module: Any) -> None:
    """Ours, or peft's."""
    if isinstance(module, LoRALayer) or (hasattr(module, "get_base_layer") and hasattr(module, "lora_A")):
        unet.set_submodule(path, module.base_layer)


def _forget_peft(unet: Any) -> None:
    # peft warns of a second adapter where it finds even an empty table.
    if getattr(unet, "peft_config", None) is not None:
        del unet.peft_config


def _pairs(state: dict[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B by module."""
    suffixes = (".lora_A.weight", ".lora_B.weight")
    if odd := sorted(name for name in state if not name.endswith(suffixes)):
        raise ModelError(f"{folder} is more than a plain LoRA: it holds {odd[0]}. {_MERGE}")
    paths = sorted({name.removesuffix(suffix) for name in state for suffix in suffixes if name.endswith(suffix)})
    if lonely := [path for path in paths if any(path + suffix not in state for suffix in suffixes)]:
        raise ModelError(f"{folder} does not fit together: {lonely[0]} has only one of lora_A and lora_B")
    return {path: (state[path + suffixes[0]], state[path + suffixes[1]]) for path in paths}


def _check_fits(unet: Any, path: str, a: Tensor, b: Tensor, folder: Path) -> None:
    try:
        module = unet.get_submodule(path)
    except AttributeError:
        raise ModelError(f"{folder} does not fit this UNet: {path} has no counterpart") from None
    base = getattr(module, "base_layer", module)
    if not isinstance(base, (nn.Linear, nn.Conv2d)):
        raise ModelError(f"{folder} does not fit this UNet: {path} is a {type(base).__name__}")
    rank, shape = len(a), tuple(base.weight.shape)
    if a.shape[1:] != shape[1:] or b.flatten(1).shape != (shape[0], rank):
        raise ModelError(
            f"{folder} does not fit this UNet: {path} has a weight of {shape}, its LoRA has {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )


def _config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text("utf-8"))
        float(config["lora_alpha"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} is no configuration of a LoRA: {error!r}") from error
    found = {name: config[name] for name in (*_MORE, *_PLAIN) if name in config}
    for name, value in found.items():
        if value not in _PLAIN[name] if name in _PLAIN else value:
            raise ModelError(f"{path} is more than a plain LoRA: {name}={value!r}. {_MERGE}")
    return config


def _weights(folder: Path) -> Path:
    path = folder / WEIGHTS
    if not path.is_file():
        for other in sorted(folder.glob("adapter_model.*")):
            refuse_pickle(other)
        raise ModelError(f"{folder} is no LoRA folder: {WEIGHTS} is not there")
    return path
