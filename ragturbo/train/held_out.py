"""Pairs that are never trained on: whether what a run learns carries over, and what neighbours have to do with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ragturbo.errors import InvalidRequest
from ragturbo.train.data import TrainingData
from ragturbo.train.losses import SmoothL1, masked_mean

if TYPE_CHECKING:
    from ragturbo.train.ladd import LADDTrainer

MOST = 512


class HeldOut:
    """Smooth L1 to the teacher on up to 512 samples, always the same, by the weights of the moment (no average)."""

    def __init__(self, data: TrainingData) -> None:
        (source,) = data.sources
        if "noise" not in source.fields:
            raise InvalidRequest(
                f"data.held_out={source.folder} has no noise to start from: make it with `ragturbo data teacher`"
            )
        self.data, self.count = data, min(MOST, len(source))
        self.smooth_l1 = SmoothL1()

    @torch.no_grad()
    def measure(self, trainer: LADDTrainer) -> dict[str, float]:
        """held_out, and where the run retrieves held_out_alone: the same without neighbours (λ = 0)."""
        trainer.student.eval()
        ways = {"held_out": False, "held_out_alone": True} if self.data.num_neighbors else {"held_out": False}
        return {name: self._mean(trainer, alone) for name, alone in ways.items()}

    def _mean(self, trainer: LADDTrainer, alone: bool) -> float:
        size, total = trainer.config.loop.micro_batch, torch.zeros((), device=trainer.device)
        for start in range(0, self.count, size):
            batch = self.data.batch(range(start, min(start + size, self.count))).to(trainer.device)
            first = torch.zeros(len(batch), dtype=torch.int64, device=trainer.device)
            z0_hat = trainer.estimate(batch, batch.noise, first, alone=alone)
            total += masked_mean(self.smooth_l1(z0_hat, batch.z0), batch.paired) * len(batch)
        return float(total) / self.count
