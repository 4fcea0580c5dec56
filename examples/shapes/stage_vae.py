"""Stage 2: the autoencoder. Absolute error on pixels and on their differences: edges stay where they are, and sharp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data import batches, to_float
from diffusers import AutoencoderKL
from loop import Average, rate, run, set_rate
from networks import make_vae
from settings import Settings
from torch import Tensor


def train_vae(work: Path, s: Settings, minutes: float | None = None) -> None:
    images = np.load(work / "images.npy", mmap_mode="r")
    torch.manual_seed(s.seed)
    vae = make_vae(s)
    mean = Average(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=s.vae_rate, weight_decay=1e-3, betas=(0.9, 0.99))

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.vae_steps, s.vae_rate))
        index = torch.randint(len(images), (s.vae_batch,), generator=generator).numpy()
        x = to_float(images[np.sort(index)])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        error = y.float() - x
        # Squares first see the colours of things, which cover a tenth of the picture; absolute values then see edges.
        pixels, squares, edges = error.abs().mean(), error.square().mean(), differences(error)
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        optimizer.zero_grad(set_to_none=True)
        (pixels + 4 * squares + edges + s.vae_kl * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        mean.update(vae, step)
        return {"pixels": pixels.item(), "squares": squares.item(), "edges": edges.item(), "kl": kl.item()}

    state = {"vae": vae, "mean": mean, "optimizer": optimizer}
    run("vae", work, update, state, steps=s.vae_steps, seed=s.seed + 1, minutes=minutes)
    best = mean.module
    best.register_to_config(scaling_factor=1 / latent_deviation(best, images[:2048]))
    best.save_pretrained(work / "vae")


def differences(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def latent_deviation(vae: AutoencoderKL, images: np.ndarray) -> float:
    means = [vae.encode(to_float(images[chunk])).latent_dist.mean for chunk in batches(len(images), 128)]
    return float(torch.cat(means).std())
