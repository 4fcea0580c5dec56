"""A grid of sample images during training: the target latents decoded, and the student's one-step estimate of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ragturbo.train.data import Batch


@torch.no_grad()
def sample_grid(
    batch: Batch, estimate: Callable[[Batch, Tensor], Tensor], decode: Callable[[Tensor], Tensor], seed: int
) -> Any:
    """A PIL image of two rows: z_0 decoded, and ẑ_0 from pure noise.

    Args:
        estimate: (batch, noise) -> ẑ_0.
        decode: latents -> (B, 3, H, W) in [0, 1].
        seed: of the noise for samples without their own.
    """
    from PIL import Image

    device = batch.z0.device
    drawn = torch.randn(batch.z0.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    noise = torch.where(batch.paired.view(-1, 1, 1, 1), batch.noise, drawn)
    rows = [_row(decode(latents)) for latents in (batch.z0, estimate(batch, noise))]
    return Image.fromarray(torch.cat(rows, 0).numpy())


def _row(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (H, B·W, 3) uint8"""
    pixels = (images.float().nan_to_num(0.0) * 255).round().to(torch.uint8)
    return torch.cat(list(pixels), -1).permute(1, 2, 0).cpu()
