"""The paper's other few-step row: a latent consistency model of the teacher, for four steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch
from device import DEVICE, Table, autocast
from diffusers import UNet2DConditionModel
from loop import Average, rate, run, set_rate
from sampling import Texts, noise_levels
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F


def distil_lcm(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Any point of the guided teacher's path must lead to the same picture as the point one solver step further."""
    texts, captions = Texts(work), json.loads((work / "captions.json").read_text())
    latents = Table(work / "latents.npy")
    alpha, sigma = noise_levels()
    teacher = UNet2DConditionModel.from_pretrained(work / "teacher_unet").to(DEVICE).eval().requires_grad_(False)
    torch.manual_seed(s.seed + 8)
    model = copy.deepcopy(teacher).requires_grad_(True).train()
    slow = Average(model, 0.95)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lcm_rate, weight_decay=0.0, betas=(0.9, 0.99))
    grid = 1000 // s.sampling_steps

    def column(level: Tensor) -> Tensor:
        return level.view(-1, 1, 1, 1)

    def consistent(unet: nn.Module, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """The picture a point leads to. Zero terminal SNR keeps x0 = αx - σv the identity at t = 0, to α² = 0.999."""
        with autocast():
            v = unet(x, t, states).sample.float()
        return column(alpha[t]) * x - column(sigma[t]) * v

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.lcm_steps, s.lcm_rate))
        index = torch.randint(len(latents), (s.student_batch,), generator=generator)
        x0 = latents[index].float()
        noise = torch.randn(x0.shape, generator=generator).to(DEVICE)
        t = torch.randint(1, s.sampling_steps + 1, (len(x0),), generator=generator).to(DEVICE) * grid - 1
        before = (t - grid).clamp_min(0)
        x = column(alpha[t]) * x0 + column(sigma[t]) * noise
        states = texts.states([captions[i] for i in index.tolist()])
        with torch.no_grad():
            with autocast():
                both = torch.cat([texts.empty.expand(len(x), -1, -1), states])
                free, led = teacher(torch.cat([x, x]), torch.cat([t, t]), both).sample.float().chunk(2)
            v = free + s.guidance * (led - free)
            clean, eps = column(alpha[t]) * x - column(sigma[t]) * v, column(sigma[t]) * x + column(alpha[t]) * v
            nearer = column(alpha[before]) * clean + column(sigma[before]) * eps
            target = consistent(slow.module, nearer, before, states)
            # The path's last point is its own picture.
            target = torch.where(column(before == 0), clean, target)
        loss = F.huber_loss(consistent(model, x, t, states), target, delta=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slow.update(model, step)
        return {"consistency": loss.item()}

    run("lcm", work, update, {"model": model, "slow": slow, "optimizer": optimizer}, steps=s.lcm_steps, seed=s.seed + 9,
        minutes=minutes)  # fmt: skip
    slow.module.save_pretrained(work / "lcm_unet")
