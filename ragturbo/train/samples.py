"""A look at the student while it trains: its images under the ones it is to match, for the same noise and prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ragturbo.train.ladd import LADDTrainer


@torch.no_grad()
def sample_grid(trainer: LADDTrainer) -> Any:
    """A PIL image of two rows: z_0 decoded, and one step of the student from pure noise. Always the same samples."""
    from PIL import Image

    count = trainer.config.loop.samples
    batch = trainer.data.batch(range(count)).to(trainer.device)
    generator = torch.Generator(trainer.device).manual_seed(trainer.config.seed)
    drawn = torch.randn(batch.z0.shape, generator=generator, device=trainer.device)
    noise = torch.where(batch.paired.view(-1, 1, 1, 1), batch.noise, drawn)
    first = torch.zeros(count, dtype=torch.int64, device=trainer.device)
    z0_hat = trainer.estimate(batch, noise, first)
    rows = [_strip(trainer.bundle.vae.decode(latents)) for latents in (batch.z0, z0_hat)]
    return Image.fromarray(torch.cat(rows, 0).numpy())


def _strip(images: Tensor) -> Tensor:
    """(B, 3, H, W) in [0, 1] -> (H, B·W, 3) uint8"""
    pixels = (images.float().nan_to_num(0.0) * 255).round().to(torch.uint8)
    return torch.cat(list(pixels), -1).permute(1, 2, 0).cpu()
