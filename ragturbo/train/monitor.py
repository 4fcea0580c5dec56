"""Monitoring during training: the student's error on held-out pairs, and grids of sample images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.train.data import Batch, TrainingData
from ragturbo.train.losses import masked_mean, smooth_l1

# (batch, noise, retrieve=True) -> ẑ_0
Estimate = Callable[..., Tensor]


class HeldOut:
    """Smooth L1 to the teacher's latents on held-out pairs: the first 512 at most, the same ones each time."""

    def __init__(self, data: TrainingData) -> None:
        (source,) = data.sources
        if "noise" not in source.fields:
            raise InvalidRequest(
                f"data.held_out={source.folder} has no stored noise: make it with `ragturbo data teacher`"
            )
        self.data, self.count = data, min(512, len(source))

    @torch.no_grad()
    def measure(self, estimate: Estimate, batch_size: int, device: torch.device) -> dict[str, float]:
        """{"held_out": mean error} and, if the run retrieves, "held_out_alone": without neighbours (λ = 0)."""
        variants = {"held_out": True} | ({"held_out_alone": False} if self.data.num_neighbors else {})
        totals = {name: torch.zeros((), device=device) for name in variants}
        for start in range(0, self.count, batch_size):
            batch = self.data.batch(range(start, min(start + batch_size, self.count))).to(device)
            for name, retrieve in variants.items():
                z0_hat = estimate(batch, batch.noise, retrieve=retrieve)
                totals[name] += masked_mean(smooth_l1(z0_hat, batch.z0), batch.paired) * len(batch)
        return {name: float(total) / self.count for name, total in totals.items()}


@torch.no_grad()
def sample_grid(batch: Batch, estimate: Estimate, decode: Callable[[Tensor], Tensor], seed: int) -> Any:
    """A PIL image of two rows: decoded z_0, and ẑ_0 from pure noise (drawn with `seed` for samples without noise)."""
    from PIL import Image

    device = batch.z0.device
    drawn = torch.randn(batch.z0.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    noise = torch.where(batch.paired.view(-1, 1, 1, 1), batch.noise, drawn)
    rows = []
    for latents in (batch.z0, estimate(batch, noise)):
        pixels = (decode(latents).float().nan_to_num(0.0) * 255).round().to(torch.uint8)
        # (B, 3, H, W) -> (H, B·W, 3)
        rows.append(torch.cat(list(pixels), -1).permute(1, 2, 0).cpu())
    return Image.fromarray(torch.cat(rows, 0).numpy())
