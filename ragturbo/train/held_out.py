"""The student's error on pairs that are not trained on, with and without neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ragturbo.errors import InvalidRequest
from ragturbo.train.data import TrainingData
from ragturbo.train.losses import masked_mean, smooth_l1

# Samples measured at most.
LIMIT = 512


class HeldOut:
    """Smooth L1 to the teacher's latents on the same samples each time, 512 at most."""

    def __init__(self, data: TrainingData) -> None:
        (source,) = data.sources
        if "noise" not in source.fields:
            raise InvalidRequest(
                f"data.held_out={source.folder} has no noise to start from: make it with `ragturbo data teacher`"
            )
        self.data, self.count = data, min(LIMIT, len(source))

    @torch.no_grad()
    def measure(self, estimate: Callable[..., Tensor], batch_size: int, device: torch.device) -> dict[str, float]:
        """Mean error with the current weights, not their moving average.

        Args:
            estimate: (batch, noise, retrieve=bool) -> ẑ_0.

        Returns:
            "held_out" and, if the run retrieves, "held_out_alone": the same without neighbours (λ = 0).
        """
        variants = {"held_out": True} | ({"held_out_alone": False} if self.data.num_neighbors else {})
        totals = {name: torch.zeros((), device=device) for name in variants}
        for start in range(0, self.count, batch_size):
            batch = self.data.batch(range(start, min(start + batch_size, self.count))).to(device)
            for name, retrieve in variants.items():
                z0_hat = estimate(batch, batch.noise, retrieve=retrieve)
                totals[name] += masked_mean(smooth_l1(z0_hat, batch.z0), batch.paired) * len(batch)
        return {name: float(total) / self.count for name, total in totals.items()}
