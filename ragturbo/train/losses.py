"""The training objective, Eqs. 6-10. Logits of head k are (B, P): one value a position of the stage's grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class HingeD:
    """Eq. 6: Σ_k E[max(0, 1 − D_k(z_s))] + E[max(0, 1 + D_k(ẑ_s))]."""

    def per_head(
        self,
        real: Sequence[Tensor],
        fake: Sequence[Tensor],
        weight: Tensor | None = None,
        real_weight: Tensor | None = None,
    ) -> Tensor:
        """The K terms of the sum. fake may hold more samples than real (misaligned pairs); weight (K, B_fake) and
        real_weight (B,): how much each of them counts. A head that answers 0 everywhere has 2.0, whatever the weights:
        the loss of no signal."""
        weights = [None] * len(real) if weight is None else list(weight)
        return torch.stack(
            [
                weighted_mean(F.relu(1 - r).mean(1), real_weight) + weighted_mean(F.relu(1 + f).mean(1), w)
                for r, f, w in zip(real, fake, weights, strict=True)
            ]
        )

    def __call__(self, real: Sequence[Tensor], fake: Sequence[Tensor], weight: Tensor | None = None) -> Tensor:
        return self.per_head(real, fake, weight).sum()


@dataclass(frozen=True)
class HingeG:
    """Eq. 7: −Σ_k E[D_k(ẑ_s)]."""

    def __call__(self, fake: Sequence[Tensor]) -> Tensor:
        return -torch.stack([logits.mean() for logits in fake]).sum()


@dataclass(frozen=True)
class SmoothL1:
    """Eq. 8, elementwise and averaged: ½d² where |d| < 1, |d| − ½ elsewhere."""

    def __call__(self, z0_hat: Tensor, z0: Tensor) -> Tensor:
        """(B, c, H, W) twice -> (B,)"""
        return F.smooth_l1_loss(z0_hat.float(), z0.float(), reduction="none", beta=1.0).flatten(1).mean(1)


@dataclass(frozen=True)
class R1:
    """γ/2 · E‖∇_F D_k(F)‖² on the real features F of every stage: smoothness where spectral norm is not wanted.

    The gradient is taken with respect to what the heads read, so the double backward stays inside the heads.
    """

    gamma: float

    def __call__(self, logits: Sequence[Tensor], features: Sequence[Tensor]) -> Tensor:
        gradients = torch.autograd.grad([x.sum() for x in logits], list(features), create_graph=True)
        return self.gamma / 2 * torch.stack([g.float().square().flatten(1).sum(1).mean() for g in gradients]).sum()


@dataclass(frozen=True)
class Total:
    """Eq. 10: L_adv + α·L_distill + β·L_latentLPIPS."""

    alpha: float = 2.5
    beta: float = 1.0
    adversarial: float = 1.0

    def __call__(self, adv: Tensor, distill: Tensor, lpips: Tensor) -> Tensor:
        return self.adversarial * adv + self.alpha * distill + self.beta * lpips


def masked_mean(per_sample: Tensor, mask: Tensor) -> Tensor:
    """Σ mask·loss / B. The mean is over all samples, not over the unmasked: so it is the same however a batch is split
    into micro-batches and processes, and a source's share of regression is its share of the data."""
    # where, not a product: a masked sample's NaN is nobody's loss.
    return torch.where(mask, per_sample, torch.zeros_like(per_sample)).mean()


def weighted_mean(per_sample: Tensor, weight: Tensor | None) -> Tensor:
    """Σ w·x / Σ w."""
    return per_sample.mean() if weight is None else (per_sample * weight).sum() / weight.sum().clamp(min=1e-12)
