"""Distil the teacher into a latent consistency model for four steps."""

from __future__ import annotations

import copy
from pathlib import Path

import parallel
import torch
from device import DEVICE, Table, autocast
from diffusers import UNet2DConditionModel
from loop import Average, Levels, rate, run, set_rate
from networks import LATENT_SIDE
from sampling import TextStates, noise_levels
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F


def distil_lcm(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Train consistency: a point of the guided teacher's path maps to the same picture as the next one."""
    latents, tokens, texts = Table(work / "latents.npy"), Table(work / "tokens.npy", s.scenes), TextStates(work)
    text_states = Table(texts.write_all(work, tokens.rows))
    alpha, sigma = noise_levels()
    teacher = UNet2DConditionModel.from_pretrained(work / "teacher_unet").to(DEVICE).eval().requires_grad_(False)
    torch.manual_seed(s.seed + 8)
    model = copy.deepcopy(teacher).requires_grad_(True).train()
    slow, levels = Average(model, 0.95), Levels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.lcm_rate, weight_decay=0.0, betas=(0.9, 0.99))
    grid = 1000 // s.sampling_steps

    def column(level: Tensor) -> Tensor:
        return level.view(-1, 1, 1, 1)

    def consistent(unet: nn.Module, x: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Return x0 = αx - σv, which is nearly the identity at t = 0 (α² = 0.999)."""
        with autocast():
            v = unet(x, t, states).sample.float()
        return column(alpha[t]) * x - column(sigma[t]) * v

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.lcm_steps, s.lcm_rate))
        index = torch.randint(len(latents), (s.student_batch,), generator=generator)
        noise = torch.randn((len(index), 4, LATENT_SIDE, LATENT_SIDE), generator=generator)
        t = torch.randint(1, s.sampling_steps + 1, (len(index),), generator=generator) * grid - 1
        index, noise, t = (parallel.part(drawn).to(DEVICE) for drawn in (index, noise, t))
        x0, states = latents[index].float(), text_states[index].float()
        before = (t - grid).clamp_min(0)
        x = column(alpha[t]) * x0 + column(sigma[t]) * noise
        with torch.no_grad():
            with autocast():
                both = torch.cat([texts.empty.expand(len(x), -1, -1), states])
                out = teacher(torch.cat([x, x]), torch.cat([t, t]), both).sample
            unconditional, conditional = out.float().chunk(2)
            v = unconditional + s.guidance * (conditional - unconditional)
            clean, eps = column(alpha[t]) * x - column(sigma[t]) * v, column(sigma[t]) * x + column(alpha[t]) * v
            nearer = column(alpha[before]) * clean + column(sigma[before]) * eps
            target = consistent(slow.module, nearer, before, states)
            # The last point of the path is the picture itself.
            target = torch.where(column(before == 0), clean, target)
        errors = F.huber_loss(consistent(model, x, t, states), target, reduction="none", delta=0.1).mean((1, 2, 3))
        loss = (errors * levels.weights(t, errors)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.mean_gradients(model.parameters())
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        slow.update(model, step)
        return {"consistency": levels.seen.mean().item()}

    state = {"model": model, "slow": slow, "levels": levels, "optimizer": optimizer}
    run("lcm", work, update, state, steps=s.lcm_steps, seed=s.seed + 9, minutes=minutes)
    if parallel.RANK == 0:
        slow.module.save_pretrained(work / "lcm_unet")
