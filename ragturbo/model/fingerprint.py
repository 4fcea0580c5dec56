"""One encoder, one name: whether a database's features were made by the model at hand."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 64

# What a cached feature depends on: the UNet's decoder and the VAE's may be tuned, and its databases stay good.
UNET_ENCODER: tuple[str, ...] = ("conv_in.", "down_blocks.", "mid_block.", "time_embedding.")
UNET_ENCODER += ("class_embedding.", "add_embedding.", "encoder_hid_proj.")
VAE_ENCODER = ("encoder.", "quant_conv.")


def fingerprint(module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """sha256 over sorted (name, shape, 64 evenly spaced values rounded to bf16) of the parameters under `prefixes`.

    Computed on weights in the type of their file, before they are cast, folded or merged. LoRA layers do not count.
    Values go through fp16 first, so that a model's fp32 and fp16 files have one fingerprint: rounding twice is not
    rounding once.
    """
    return fingerprint_state(base_state(module), prefixes)


def fingerprint_state(state: Mapping[str, Tensor], prefixes: tuple[str, ...] = ("",)) -> str:
    state = {_canonical(name): value for name, value in state.items() if value.is_floating_point()}
    names = sorted(name for name in state if name.startswith(prefixes))
    digest = hashlib.sha256()
    samples = [_sample(state[name]) for name in names]
    # One transfer for all of them, where the weights are on a GPU.
    together = torch.cat(samples) if samples else torch.empty(0)
    values = together.to(torch.float16).to(torch.bfloat16).view(torch.int16).cpu().numpy()
    start = 0
    for name, sample in zip(names, samples, strict=True):
        digest.update(f"{name} {tuple(state[name].shape)} ".encode())
        digest.update(values[start : start + len(sample)].astype("<i2").tobytes())
        start += len(sample)
    return digest.hexdigest()


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and persistent buffers of a module in its own names, as if no LoRA had been put into it."""
    return {
        name.replace(".base_layer.", "."): value for name, value in module.state_dict().items() if "lora_" not in name
    }


def _canonical(name: str) -> str:
    """transformers 5 took the text model's outer name away; one model keeps one fingerprint."""
    return name.removeprefix("text_model.")


def _sample(value: Tensor) -> Tensor:
    """Evenly spaced values in logical order: strides, and with them channels_last, make no difference and no copy."""
    positions = np.linspace(0, value.numel() - 1, min(SAMPLES, value.numel())).round().astype(np.int64)
    if value.ndim == 0:
        return value.detach()[None].float()
    index = tuple(torch.from_numpy(axis).to(value.device) for axis in np.unravel_index(positions, value.shape))
    return value.detach()[index].float()
