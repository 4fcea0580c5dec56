"""Hashes of model parts, to check that a database's features were made by the model in use."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

SAMPLES = 64

# The parameters that cached features depend on. The decoders of UNet and VAE can be tuned without a new database.
UNET_ENCODER = (
    "conv_in.", "down_blocks.", "mid_block.", "time_embedding.", "class_embedding.", "add_embedding.",
    "encoder_hid_proj.",
)  # fmt: skip
VAE_ENCODER = ("encoder.", "quant_conv.")


def fingerprint(module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """Hash the floating-point parameters whose names start with one of `prefixes`; LoRA layers are ignored.

    Compute it in the dtype of the model's file, before weights are cast, folded or merged. Values are rounded to fp16
    and then to bf16: rounding twice differs from rounding once, and fp32 and fp16 files must have one fingerprint.

    Returns:
        sha256 over the sorted (name, shape, 64 evenly spaced values in bf16).
    """
    # transformers 5 dropped the prefix "text_model." of the text encoder's parameters.
    state = {name.removeprefix("text_model."): value for name, value in base_state(module).items()}
    names = sorted(name for name, value in state.items() if name.startswith(prefixes) and value.is_floating_point())
    samples = [_sample(state[name]) for name in names]
    # Concatenated, so that weights on a GPU are copied to the host once.
    joined = torch.cat(samples) if samples else torch.empty(0)
    values = joined.to(torch.float16).to(torch.bfloat16).view(torch.int16).cpu().numpy()
    digest = hashlib.sha256()
    start = 0
    for name, sample in zip(names, samples, strict=True):
        digest.update(f"{name} {tuple(state[name].shape)} ".encode())
        digest.update(values[start : start + len(sample)].astype("<i2").tobytes())
        start += len(sample)
    return digest.hexdigest()


def base_state(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict as it would be without a LoRA."""
    return {
        name.replace(".base_layer.", "."): value for name, value in module.state_dict().items() if "lora_" not in name
    }


def _sample(value: Tensor) -> Tensor:
    """Evenly spaced values in logical order, so that the memory format does not matter; copies only the samples."""
    value = value.detach()
    if value.ndim == 0:
        return value[None].float()
    if value.is_contiguous():
        return value.view(-1)[_positions(value.numel()).to(value.device)].float()
    places = np.unravel_index(_positions(value.numel()).numpy(), value.shape)
    return value[tuple(torch.from_numpy(axis).to(value.device) for axis in places)].float()


@lru_cache(256)
def _positions(count: int) -> Tensor:
    """Those of the samples among `count` values."""
    return torch.from_numpy(np.linspace(0, count - 1, min(SAMPLES, count)).round().astype(np.int64))
