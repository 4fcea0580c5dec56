"""Train the teacher: v-prediction diffusion on latents, with captions dropped at random for guidance.

It starts from the weights in `teacher_start/` if the stage `adopt` put them there, else from random weights.
"""

from __future__ import annotations

from pathlib import Path

import parallel
import torch
from device import DEVICE, Table, autocast
from diffusers import UNet2DConditionModel
from loop import Average, Levels, rate, run, set_rate
from networks import LATENT_SIDE, make_unet
from sampling import TextStates, noise_levels
from settings import Settings

START = "teacher_start"


def train_teacher(work: Path, s: Settings, minutes: float | None = None) -> None:
    latents, tokens, texts = Table(work / "latents.npy"), Table(work / "tokens.npy", s.scenes), TextStates(work)
    alpha, sigma = noise_levels()
    text_states = Table(texts.write_all(work, tokens.rows))
    torch.manual_seed(s.seed + 4)
    start = work / START
    unet = UNet2DConditionModel.from_pretrained(start, torch_dtype=torch.float32) if start.exists() else make_unet(s)
    unet.to(DEVICE).train()
    compiled = torch.compile(unet)
    mean, levels = Average(unet, 0.9995), Levels()
    adam = {"weight_decay": 0.01, "betas": (0.9, 0.99), "fused": True}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=s.teacher_rate, **adam)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.teacher_steps, s.teacher_rate))
        index = torch.randint(len(tokens), (s.teacher_batch,), generator=generator)
        noise = torch.randn((len(index), 4, LATENT_SIDE, LATENT_SIDE), generator=generator)
        # One timestep from each of B equal intervals, which reduces the variance of the loss.
        t = ((torch.arange(len(index)) + torch.rand(len(index), generator=generator)) * (1000 / len(index))).long()
        t = t[torch.randperm(len(t), generator=generator)]
        dropped = torch.rand(len(index), generator=generator) < s.text_dropout
        index, noise, t, dropped = (parallel.part(drawn).to(DEVICE) for drawn in (index, noise, t, dropped))
        x0, states = latents[index].float(), text_states[index].float()
        a, b = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        states[dropped] = texts.empty
        with autocast():
            out = compiled(a * x0 + b * noise, t, states).sample
        errors = ((out.float() - (a * noise - b * x0)) ** 2).mean((1, 2, 3))
        loss = (errors * levels.weights(t, errors)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.mean_gradients(unet.parameters())
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        mean.update(unet, step)
        # The mean over all levels, over the highest quarter, and over the middle levels, which form the shapes.
        late, middle = levels.seen[15:].mean().item(), levels.seen[2:10].mean().item()
        return {"v": levels.seen.mean().item(), "v_late": late, "v_middle": middle}

    state = {"unet": unet, "mean": mean, "levels": levels, "optimizer": optimizer}
    run("teacher", work, update, state, steps=s.teacher_steps, seed=s.seed + 5, minutes=minutes)
    if parallel.RANK == 0:
        mean.module.save_pretrained(work / "teacher_unet")
