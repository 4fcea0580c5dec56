"""Latents from the teacher (many steps, guided) and from the student (one step), for the recipe's own use."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import parallel
import torch
from data import batches, tokenize
from device import DEVICE, autocast
from diffusers import AutoencoderKL, UNet2DConditionModel
from networks import LATENT_SIDE, make_scheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer


class Texts:
    """The frozen text encoder: captions to hidden states, and the empty prompt's."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.model = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32)
        self.model.to(DEVICE).eval().requires_grad_(False)
        self.empty_ids = tokenize(self.tokenizer, [""])
        with torch.no_grad():
            self.empty = self.model(input_ids=self.empty_ids.to(DEVICE)).last_hidden_state

    @torch.no_grad()
    def told(self, work: Path, tokens: Tensor) -> Path:
        """states.npy (N, L, D) fp16: what the encoder says of every row of tokens, said once."""
        path = work / "states.npy"
        if parallel.RANK == 0 and not path.exists():
            part = path.with_suffix(".part.npy")
            width = self.model.config.hidden_size
            rows = np.lib.format.open_memmap(part, "w+", np.float16, (*tokens.shape, width))
            for chunk in batches(len(tokens), 512):
                said = self.model(input_ids=tokens[chunk].long().to(DEVICE)).last_hidden_state
                rows[chunk] = said.half().cpu().numpy()
            rows.flush()
            part.rename(path)
        parallel.meet()
        return path

    @torch.no_grad()
    def states(self, captions: list[str]) -> Tensor:
        return self.model(input_ids=tokenize(self.tokenizer, captions).to(DEVICE)).last_hidden_state


def noise_levels() -> tuple[Tensor, Tensor]:
    """(α, σ) of every timestep of the variance-preserving process the scheduler describes."""
    kept = make_scheduler().alphas_cumprod.float()
    return kept.sqrt().to(DEVICE), (1 - kept).sqrt().to(DEVICE)


def noise_of(seeds: range) -> Tensor:
    """(B, 4, 16, 16): each picture's noise is a function of its seed alone."""
    shape = (4, LATENT_SIDE, LATENT_SIDE)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(DEVICE)


@torch.no_grad()
def teacher_latents(
    unet: UNet2DConditionModel, x: Tensor, states: Tensor, empty: Tensor, *,
    steps: int, guidance: float, start: int = 999,
) -> Tensor:  # fmt: skip
    """Deterministic Euler (DDIM) from x at timestep `start`, which at 999 is noise alone: trailing timesteps,
    classifier-free guidance."""
    alpha, sigma = noise_levels()
    times = ((start + 1) * (1 - torch.arange(steps) / steps)).round().long() - 1
    both = torch.cat([empty.expand(len(x), -1, -1), states])
    for t, following in zip(times, [*times[1:], None], strict=True):
        with autocast():
            out = unet(torch.cat([x, x]), t, both).sample
        free, led = out.float().chunk(2)
        v = free + guidance * (led - free)
        x0 = alpha[t] * x - sigma[t] * v
        if following is not None:
            x = alpha[following] * x0 + sigma[following] * (sigma[t] * x + alpha[t] * v)
    return x0


def student_latents(unet: UNet2DConditionModel, noise: Tensor, states: Tensor) -> Tensor:
    """One step from t = 999, where x0 = -v: there is no signal in the input."""
    return -unet(noise, torch.full((len(noise),), 999, device=noise.device), states).sample


@torch.no_grad()
def consistency_latents(unet: UNet2DConditionModel, noise: Tensor, states: Tensor, *, steps: int, seed: int) -> Tensor:
    """Each step guesses the picture, and the next starts from the guess with fresh noise, a step further down."""
    alpha, sigma = noise_levels()
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.zeros_like(noise)
    for i in range(steps):
        t = round(1000 * (1 - i / steps)) - 1
        x = alpha[t] * x0 + sigma[t] * noise
        noise = torch.randn(x.shape, generator=generator).to(x.device)
        v = unet(x, torch.full((len(x),), t, device=x.device), states).sample
        x0 = alpha[t] * x - sigma[t] * v
    return x0


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """(B, 4, 16, 16) -> (B, 3, 64, 64) in about [-1, 1]."""
    scaled = latents.float() / vae.config.scaling_factor
    return torch.cat([vae.decode(scaled[chunk]).sample for chunk in batches(len(scaled), 64)])
