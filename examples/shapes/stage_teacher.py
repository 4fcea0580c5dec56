"""Stage 3: the teacher, v-prediction diffusion on latents with the caption dropped now and then for guidance."""

from __future__ import annotations

from pathlib import Path

import parallel
import torch
from device import DEVICE, Table, autocast
from loop import Average, rate, run, set_rate
from networks import LATENT_SIDE, make_unet
from sampling import Texts, noise_levels
from settings import Settings


def train_teacher(work: Path, s: Settings, minutes: float | None = None) -> None:
    latents, tokens, texts = Table(work / "latents.npy"), Table(work / "tokens.npy", s.scenes), Texts(work)
    alpha, sigma = noise_levels()
    torch.manual_seed(s.seed + 4)
    unet = make_unet(s).to(DEVICE)
    mean = Average(unet, 0.9995)
    adam = {"weight_decay": 0.01, "betas": (0.9, 0.99), "fused": True}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=s.teacher_rate, **adam)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.teacher_steps, s.teacher_rate))
        index = torch.randint(len(tokens), (s.teacher_batch,), generator=generator)
        noise = torch.randn((len(index), 4, LATENT_SIDE, LATENT_SIDE), generator=generator)
        # One timestep from each of B equal strata: less noise in the loss than B free draws.
        t = ((torch.arange(len(index)) + torch.rand(len(index), generator=generator)) * (1000 / len(index))).long()
        t = t[torch.randperm(len(t), generator=generator)]
        dropped = torch.rand(len(index), generator=generator) < s.text_dropout
        index, noise, t, dropped = (parallel.part(drawn).to(DEVICE) for drawn in (index, noise, t, dropped))
        x0, ids = latents[index].float(), tokens[index].long()
        a, b = alpha[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        ids[dropped] = texts.empty_ids[0].to(DEVICE)
        with autocast():
            with torch.no_grad():
                states = texts.model(input_ids=ids).last_hidden_state
            out = unet(a * x0 + b * noise, t, states).sample
        error = (out.float() - (a * noise - b * x0)) ** 2
        loss = error.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        parallel.mean_gradients(unet.parameters())
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        mean.update(unet, step)
        return {"v": loss.item(), "v_late": error[t > 750].mean().item(), "v_early": error[t < 250].mean().item()}

    state = {"unet": unet, "mean": mean, "optimizer": optimizer}
    run("teacher", work, update, state, steps=s.teacher_steps, seed=s.seed + 5, minutes=minutes)
    if parallel.RANK == 0:
        mean.module.save_pretrained(work / "teacher_unet")
