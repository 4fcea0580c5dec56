"""Images to latents and back, for AutoencoderKL and AutoencoderTiny, in the scale the UNet works in."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.ties import sharing_copy


class VAE:
    """A diffusers autoencoder. Latents are the posterior's mean, never a sample: a database build is repeatable."""

    def __init__(self, module: Any) -> None:
        known = isinstance(module, (AutoencoderKL, AutoencoderTiny))
        if not known:
            raise ModelError(f"{type(module).__name__} is not a supported VAE: AutoencoderKL or AutoencoderTiny")
        self.module: Any = module
        config = self.module.config
        self.scale: float = config.scaling_factor
        self.shift: float = getattr(config, "shift_factor", None) or 0.0
        self.channels: int = config.latent_channels
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        if getattr(config, "latents_mean", None) is not None:
            raise ModelError("VAEs with a mean and standard deviation per latent channel are not supported")

    @property
    def kind(self) -> str:
        return "tiny" if isinstance(self.module, AutoencoderTiny) else "full"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    @property
    def force_upcast(self) -> bool:
        """Whether the model's makers say that fp16 overflows in it."""
        return bool(getattr(self.module.config, "force_upcast", False))

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], sides a multiple of `factor` -> (B, c, H/factor, W/factor)."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InvalidRequest(f"an image of {width}x{height} is not a multiple of {self.factor} pixels")
        out = self.module.encode(images.to(self.dtype))
        # AutoencoderTiny has no posterior: its latents are what it gives.
        latents = out.latents if isinstance(self.module, AutoencoderTiny) else out.latent_dist.mean
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W) in [0, 1]. NaN stays NaN."""
        # Divided before the cast: fp32 latents keep their bits for as long as they can.
        images = self.module.decode((latents / self.scale + self.shift).to(self.dtype)).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def decoder_in(self, dtype: torch.dtype) -> VAE:
        """A copy of the decoding half in another type."""
        module = sharing_copy(self.module)
        module.encoder = None
        # A real copy before the cast, which works in place.
        return VAE(copy.deepcopy(module).to(dtype))
