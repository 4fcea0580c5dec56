"""Stage 2: the autoencoder. Absolute error on pixels and on their differences: edges stay where they are, and sharp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from data import batches, to_float
from device import DEVICE, Table, autocast
from diffusers import AutoencoderKL
from loop import Average, rate, run, set_rate
from networks import LATENT_SIDE, make_tiny_vae, make_vae
from settings import Settings
from torch import Tensor
from torch.nn import functional as F


def train_vae(work: Path, s: Settings, minutes: float | None = None) -> None:
    images = Table(work / "images.npy")
    torch.manual_seed(s.seed)
    vae = make_vae(s).to(DEVICE)
    mean = Average(vae, 0.995)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=s.vae_rate, weight_decay=1e-3, betas=(0.9, 0.99))

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.vae_steps, s.vae_rate))
        x = to_float(images[torch.randint(len(images), (s.vae_batch,), generator=generator)])
        noise = torch.randn((len(x), 4, LATENT_SIDE, LATENT_SIDE), generator=generator).to(DEVICE)
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        error = weighted(y.float() - x, x)
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
    whiten(best, images[torch.arange(2048)])
    best.save_pretrained(work / "vae")


def train_decoder(work: Path, s: Settings, minutes: float | None = None) -> None:
    """The encoder stays as the teacher knows it; the decoder goes on alone, with the latents it will be given."""
    images, latents = Table(work / "images.npy"), Table(work / "latents.npy")
    torch.manual_seed(s.seed + 20)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE)
    parts = torch.nn.ModuleList([vae.post_quant_conv, vae.decoder]).train()
    mean = Average(parts, 0.995)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=s.vae_rate, weight_decay=1e-3, betas=(0.9, 0.99))

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.decoder_steps, s.vae_rate / 2))
        index = torch.randint(len(latents), (s.vae_batch,), generator=generator)
        x, z = to_float(images[index]), latents[index].float()
        # A sampler's latents are never quite the encoder's.
        z = z + 0.03 * torch.randn(z.shape, generator=generator).to(DEVICE)
        with autocast():
            y = parts[1](parts[0](z / vae.config.scaling_factor))
        error = weighted(y.float() - x, x)
        pixels, squares, edges = error.abs().mean(), error.square().mean(), differences(error)
        optimizer.zero_grad(set_to_none=True)
        (pixels + 4 * squares + edges).backward()
        torch.nn.utils.clip_grad_norm_(parts.parameters(), 1.0)
        optimizer.step()
        mean.update(parts, step)
        return {"pixels": pixels.item(), "squares": squares.item(), "edges": edges.item()}

    state = {"parts": parts, "mean": mean, "optimizer": optimizer}
    run("decoder", work, update, state, steps=s.decoder_steps, seed=s.seed + 21, minutes=minutes)
    vae.post_quant_conv, vae.decoder = mean.module
    vae.save_pretrained(work / "vae")


def train_tiny(work: Path, s: Settings, minutes: float | None = None) -> None:
    """`vae="tiny"`: an AutoencoderTiny for the latents the large one has fixed."""
    images, latents = Table(work / "images.npy"), Table(work / "latents.npy")
    torch.manual_seed(s.seed + 22)
    tiny = make_tiny_vae(s).to(DEVICE)
    mean = Average(tiny, 0.995)
    optimizer = torch.optim.AdamW(tiny.parameters(), lr=s.vae_rate, weight_decay=1e-3, betas=(0.9, 0.99))

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.tiny_steps, s.vae_rate))
        index = torch.randint(len(latents), (s.vae_batch,), generator=generator)
        x, z = to_float(images[index]), latents[index].float()
        noisy = z + 0.03 * torch.randn(z.shape, generator=generator).to(DEVICE)
        with autocast():
            seen, y = tiny.encode(x).latents, tiny.decode(noisy).sample
        error = weighted(y.float() - x, x)
        pixels, squares, edges = error.abs().mean(), error.square().mean(), differences(error)
        encoded = F.smooth_l1_loss(seen.float(), z, beta=0.1)
        optimizer.zero_grad(set_to_none=True)
        (pixels + 4 * squares + edges + encoded).backward()
        torch.nn.utils.clip_grad_norm_(tiny.parameters(), 1.0)
        optimizer.step()
        mean.update(tiny, step)
        return {"pixels": pixels.item(), "squares": squares.item(), "edges": edges.item(), "encoded": encoded.item()}

    state = {"tiny": tiny, "mean": mean, "optimizer": optimizer}
    run("tiny", work, update, state, steps=s.tiny_steps, seed=s.seed + 23, minutes=minutes)
    mean.module.save_pretrained(work / "vae_tiny")


def weighted(error: Tensor, x: Tensor) -> Tensor:
    """Errors in and around things count four times: the ground is most of the picture, and easy."""
    thing = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    return error * (1 + 3 * F.max_pool2d(thing, 5, 1, 2))


def differences(error: Tensor) -> Tensor:
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: np.ndarray | Tensor) -> None:
    """Folds into the 1×1 convolutions around the latents what makes their channels independent, of zero mean and unit
    variance: otherwise the ground's brightness fills three of four, and noise drowns colours long before it."""
    means = torch.cat([vae.encode(to_float(images[c])).latent_dist.mean for c in batches(len(images), 128)])
    cells = means.permute(1, 0, 2, 3).reshape(means.shape[1], -1)
    shift = cells.mean(1)
    variance, axes = torch.linalg.eigh(torch.cov(cells))
    into = axes @ torch.diag(variance.rsqrt()) @ axes.T
    before, after = vae.quant_conv, vae.post_quant_conv
    # The variances keep their channels: nothing samples them any more.
    before.weight[:4] = (into @ before.weight[:4, :, 0, 0])[..., None, None]
    before.bias[:4] = into @ (before.bias[:4] - shift)
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight.copy_((after.weight[:, :, 0, 0] @ torch.linalg.inv(into))[..., None, None])
    vae.register_to_config(scaling_factor=1.0)
