"""Train the autoencoders: absolute and squared errors of the pixels, and absolute errors of their differences."""

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
from torch import Tensor, nn
from torch.nn import functional as F


def train_vae(work: Path, s: Settings, minutes: float | None = None) -> None:
    images = Table(work / "images.npy")
    torch.manual_seed(s.seed)
    vae = make_vae(s).to(DEVICE)
    mean, optimizer = Average(vae, 0.995), _optimizer(vae, s)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.vae_steps, s.vae_rate))
        x = to_float(images[torch.randint(len(images), (s.vae_batch,), generator=generator)])
        noise = torch.randn((len(x), 4, LATENT_SIDE, LATENT_SIDE), generator=generator).to(DEVICE)
        with autocast():
            posterior = vae.encode(x).latent_dist
            y = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = 0.5 * (posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        loss, parts = _reconstruction(y, x)
        _step(vae, optimizer, mean, loss + s.vae_kl * kl, step)
        return {**parts, "kl": kl.item()}

    state = {"vae": vae, "mean": mean, "optimizer": optimizer}
    run("vae", work, update, state, steps=s.vae_steps, seed=s.seed + 1, minutes=minutes)
    best = mean.module
    whiten(best, images[torch.arange(2048)])
    best.save_pretrained(work / "vae")


def train_decoder(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Continue training the decoder alone; the encoder must stay as the teacher knows it."""
    images, latents = Table(work / "images.npy"), Table(work / "latents.npy")
    torch.manual_seed(s.seed + 20)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(DEVICE)
    parts = nn.ModuleList([vae.post_quant_conv, vae.decoder]).train()
    mean, optimizer = Average(parts, 0.995), _optimizer(parts, s)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.decoder_steps, s.vae_rate / 2))
        x, z, noisy = _batch(images, latents, s.vae_batch, generator)
        with autocast():
            y = parts[1](parts[0](noisy / vae.config.scaling_factor))
        loss, losses = _reconstruction(y, x)
        _step(parts, optimizer, mean, loss, step)
        return losses

    state = {"parts": parts, "mean": mean, "optimizer": optimizer}
    run("decoder", work, update, state, steps=s.decoder_steps, seed=s.seed + 21, minutes=minutes)
    vae.post_quant_conv, vae.decoder = mean.module
    vae.save_pretrained(work / "vae")


def train_tiny(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Train an AutoencoderTiny for the latents of the large autoencoder; `vae="tiny"` loads it."""
    images, latents = Table(work / "images.npy"), Table(work / "latents.npy")
    torch.manual_seed(s.seed + 22)
    tiny = make_tiny_vae(s).to(DEVICE)
    mean, optimizer = Average(tiny, 0.995), _optimizer(tiny, s)

    def update(step: int, generator: torch.Generator) -> dict[str, float]:
        set_rate(optimizer, rate(step, s.tiny_steps, s.vae_rate))
        x, z, noisy = _batch(images, latents, s.vae_batch, generator)
        with autocast():
            encoded, y = tiny.encode(x).latents, tiny.decode(noisy).sample
        encoder_loss = F.smooth_l1_loss(encoded.float(), z, beta=0.1)
        loss, losses = _reconstruction(y, x)
        _step(tiny, optimizer, mean, loss + encoder_loss, step)
        return {**losses, "encoded": encoder_loss.item()}

    state = {"tiny": tiny, "mean": mean, "optimizer": optimizer}
    run("tiny", work, update, state, steps=s.tiny_steps, seed=s.seed + 23, minutes=minutes)
    mean.module.save_pretrained(work / "vae_tiny")


def _optimizer(module: nn.Module, s: Settings) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=s.vae_rate, weight_decay=1e-3, betas=(0.9, 0.99))


def _batch(images: Table, latents: Table, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return images, their latents, and the latents with noise, since a sampler's latents differ from the encoder's."""
    index = torch.randint(len(latents), (count,), generator=generator)
    x, z = to_float(images[index]), latents[index].float()
    return x, z, z + 0.03 * torch.randn(z.shape, generator=generator).to(DEVICE)


def _reconstruction(y: Tensor, x: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Return the reconstruction loss and its parts.

    Errors on and around things count four times, because most of the picture is background. The squares converge first
    to the colours of the things, the absolute errors then to sharp edges.
    """
    thing = ((x - x[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.1).float()
    error = (y.float() - x) * (1 + 3 * F.max_pool2d(thing, 5, 1, 2))
    pixels, squares = error.abs().mean(), error.square().mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    parts = {"pixels": pixels.item(), "squares": squares.item(), "edges": edges.item()}
    return pixels + 4 * squares + edges, parts


def _step(module: nn.Module, optimizer: torch.optim.Optimizer, mean: Average, loss: Tensor, step: int) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    mean.update(module, step)


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: np.ndarray | Tensor) -> None:
    """Make the latent channels uncorrelated, of zero mean and unit variance, by changing the 1×1 convolutions.

    Otherwise the brightness of the background fills three of the four channels, and noise hides the colours too early.
    """
    means = torch.cat([vae.encode(to_float(images[c])).latent_dist.mean for c in batches(len(images), 128)])
    cells = means.permute(1, 0, 2, 3).reshape(means.shape[1], -1)
    shift = cells.mean(1)
    variance, axes = torch.linalg.eigh(torch.cov(cells))
    matrix = axes @ torch.diag(variance.rsqrt()) @ axes.T
    before, after = vae.quant_conv, vae.post_quant_conv
    # The channels of the variances are not used after training and stay as they are.
    before.weight[:4] = (matrix @ before.weight[:4, :, 0, 0])[..., None, None]
    before.bias[:4] = matrix @ (before.bias[:4] - shift)
    after.bias += after.weight[:, :, 0, 0] @ shift
    after.weight.copy_((after.weight[:, :, 0, 0] @ torch.linalg.inv(matrix))[..., None, None])
    vae.register_to_config(scaling_factor=1.0)
