"""Images to latents and back, for AutoencoderKL and AutoencoderTiny, in the scale of the UNet."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest, ModelError
from ragturbo.model.networks.library_class import is_one_of
from ragturbo.model.ties import sharing_copy


class VAE:
    """An AutoencoderKL or AutoencoderTiny, of diffusers or of `networks`.

    Latents are the mean of the posterior, not a sample, so that builds are repeatable.
    """

    def __init__(self, module: Any) -> None:
        if not is_one_of(module, "AutoencoderKL", "AutoencoderTiny"):
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
    def dtype(self) -> torch.dtype:
        return next(self.module.parameters()).dtype

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1], H and W multiples of `factor` -> (B, c, H/factor, W/factor)."""
        height, width = images.shape[-2:]
        if height % self.factor or width % self.factor:
            raise InvalidRequest(f"image sides must be multiples of {self.factor} pixels, got {width}x{height}")
        out = self.module.encode(images.to(self.dtype))
        # AutoencoderTiny has no posterior.
        latents = out.latents if is_one_of(self.module, "AutoencoderTiny") else out.latent_dist.mean
        return (latents - self.shift) * self.scale

    def decode(self, latents: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, 3, H, W) in [0, 1]. NaN stays NaN."""
        # Scaled before the cast, in the precision of the latents.
        images = self.module.decode((latents / self.scale + self.shift).to(self.dtype)).sample
        return (images / 2 + 0.5).clamp(0, 1)

    def decoder_in(self, dtype: torch.dtype) -> VAE:
        """A copy without the encoder in another dtype."""
        module = sharing_copy(self.module)
        module.encoder = None
        # `to` casts in place, so the shared tensors are copied first.
        return VAE(copy.deepcopy(module).to(dtype))
