"""𝒯 of Eq. 9: random differentiable augmentations of latents."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ragturbo.errors import InvalidRequest


@dataclass(frozen=True)
class Augmentation:
    """Flip, quarter turns, rotation, scale, shift and cutout, each applied to a sample with probability `p`."""

    p: float = 1.0
    flip: bool = True
    quarter_turns: bool = True
    max_angle: float = math.pi
    scale_std: float = 0.2
    """Standard deviation of log₂ of the scale, and of log₂ of the ratio of the scales of the two axes."""
    max_shift: float = 0.125
    """As a fraction of the side."""
    cutout: float = 0.5
    """Side of the square set to zero, as a fraction of the latent's side; 0: none."""

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or not 0 <= self.cutout <= 1 or self.max_shift < 0 or self.scale_std < 0:
            raise InvalidRequest(f"{self}: p and cutout must be in [0, 1], max_shift and scale_std at least 0")

    def draw(self, batch: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Drawn:
        """Draw the augmentation of each sample of a batch. Apply the result to both inputs."""

        def uniform(low: float, high: float) -> Tensor:
            return low + (high - low) * torch.rand(batch, generator=generator, device=device)

        def sometimes(value: Tensor, neutral: float) -> Tensor:
            chosen = torch.rand(batch, generator=generator, device=device) < self.p
            return torch.where(chosen, value, torch.full_like(value, neutral))

        flip = sometimes(torch.sign(uniform(-1, 1)), 1.0) if self.flip else torch.ones(batch, device=device)
        # A sign of 0 would map the image to a line.
        flip = torch.where(flip == 0, torch.ones_like(flip), flip)
        quarter = sometimes(torch.floor(uniform(0, 4)) * (math.pi / 2), 0.0) if self.quarter_turns else 0.0 * flip
        angle = quarter + sometimes(uniform(-self.max_angle, self.max_angle), 0.0)
        normal = torch.randn(2, batch, generator=generator, device=device) * self.scale_std
        scale, aspect = sometimes(torch.exp2(normal[0]), 1.0), sometimes(torch.exp2(normal[1] / 2), 1.0)
        # The grid runs from -1 to 1.
        shift = [2 * sometimes(uniform(-self.max_shift, self.max_shift), 0.0) for _ in range(2)]
        cos, sin = torch.cos(angle), torch.sin(angle)
        sx, sy = scale * aspect * flip, scale / aspect
        theta = torch.stack(
            [torch.stack([cos * sx, -sin * sy, shift[0]], -1), torch.stack([sin * sx, cos * sy, shift[1]], -1)], 1
        )
        centre = torch.stack([uniform(-1, 1), uniform(-1, 1)], -1)
        half = sometimes(torch.full((batch,), self.cutout, device=device), 0.0) if self.cutout else 0.0 * flip
        return Drawn(theta, centre, half)


@dataclass(frozen=True)
class Drawn:
    """Augmentations of B samples: the inverse affine map (B, 2, 3) and the square to cut out, in [-1, 1]."""

    theta: Tensor
    centre: Tensor
    half: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """(B, c, H, W) -> the same shape, differentiable in x. Positions outside the image are reflected into it."""
        height, width = x.shape[-2:]
        dtype = torch.promote_types(x.dtype, torch.float32)
        grid = F.affine_grid(self.theta.to(dtype), list(x.shape), align_corners=False)
        x = F.grid_sample(x.to(dtype), grid, mode="bilinear", padding_mode="reflection", align_corners=False)
        rows = (torch.arange(height, device=x.device) + 0.5) * (2 / height) - 1
        columns = (torch.arange(width, device=x.device) + 0.5) * (2 / width) - 1
        inside_x = (columns[None] - self.centre[:, :1]).abs() < self.half[:, None]
        inside_y = (rows[None] - self.centre[:, 1:]).abs() < self.half[:, None]
        return x.masked_fill((inside_y[:, :, None] & inside_x[:, None, :])[:, None], 0.0)
