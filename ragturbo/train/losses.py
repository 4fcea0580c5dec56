"""The training losses, Eqs. 6-10. Logits of head k are (B, P): one value per position of its feature map."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def hinge_d(
    real: Sequence[Tensor], fake: Sequence[Tensor], weight: Tensor | None = None, real_weight: Tensor | None = None
) -> Tensor:
    """Eq. 6 per head: E[max(0, 1 − D_k(z_s))] + E[max(0, 1 + D_k(ẑ_s))] -> (K,). D's loss is the sum.

    weight (K, B_fake) and real_weight (B,) weigh the samples; `fake` may hold more samples than `real` (misaligned
    pairs). A head that outputs 0 everywhere has a loss of 2, whatever the weights.
    """
    weights = [None] * len(real) if weight is None else list(weight)
    return torch.stack(
        [
            weighted_mean(F.relu(1 - r).mean(1), real_weight) + weighted_mean(F.relu(1 + f).mean(1), w)
            for r, f, w in zip(real, fake, weights, strict=True)
        ]
    )


def hinge_g(fake: Sequence[Tensor]) -> Tensor:
    """Eq. 7: −Σ_k E[D_k(ẑ_s)]."""
    return -torch.stack([logits.mean() for logits in fake]).sum()


def smooth_l1(z0_hat: Tensor, z0: Tensor) -> Tensor:
    """Eq. 8 per sample: the mean of ½d² where |d| < 1 and |d| − ½ elsewhere. (B, c, H, W) twice -> (B,)."""
    return F.smooth_l1_loss(z0_hat.float(), z0.float(), reduction="none", beta=1.0).flatten(1).mean(1)


def r1(logits: Sequence[Tensor], features: Sequence[Tensor], gamma: float) -> Tensor:
    """R1 penalty: γ/2 · E‖∇_F D_k(F)‖² summed over heads, on the real features F.

    The gradient is with respect to the heads' input, so the double backward does not run through the backbone.
    """
    gradients = torch.autograd.grad([x.sum() for x in logits], list(features), create_graph=True)
    return gamma / 2 * torch.stack([g.float().square().flatten(1).sum(1).mean() for g in gradients]).sum()


def total(
    adv: Tensor, distill: Tensor, lpips: Tensor, *, adversarial: float = 1.0, alpha: float = 2.5, beta: float = 1.0
) -> Tensor:
    """Eq. 10: L_adv + α·L_distill + β·L_latentLPIPS."""
    return adversarial * adv + alpha * distill + beta * lpips


def masked_mean(per_sample: Tensor, mask: Tensor) -> Tensor:
    """Σ mask·loss / B: over the whole batch, so that it does not depend on the split into micro-batches."""
    # torch.where, not a product: a masked sample may be NaN.
    return torch.where(mask, per_sample, torch.zeros_like(per_sample)).mean()


def weighted_mean(per_sample: Tensor, weight: Tensor | None) -> Tensor:
    """Σ w·x / Σ w, or the plain mean if `weight` is None."""
    return per_sample.mean() if weight is None else (per_sample * weight).sum() / weight.sum().clamp(min=1e-12)
