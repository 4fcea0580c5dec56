"""Sample latents from the teacher (many guided steps), the student (one step) and the consistency model (few steps)."""

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


class TextStates:
    """The frozen text encoder. `empty` are the hidden states of the empty prompt."""

    def __init__(self, work: Path) -> None:
        self.tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer")
        self.model = CLIPTextModel.from_pretrained(work / "text_encoder", dtype=torch.float32)
        self.model.to(DEVICE).eval().requires_grad_(False)
        self.empty = self.states([""])

    @torch.no_grad()
    def states(self, captions: list[str]) -> Tensor:
        """Return the hidden states of captions, (B, L, D)."""
        return self.model(input_ids=tokenize(self.tokenizer, captions).to(DEVICE)).last_hidden_state

    @torch.no_grad()
    def write_all(self, work: Path, tokens: Tensor) -> Path:
        """Write states.npy (N, L, D) fp16, the hidden states of all rows of tokens, unless it exists."""
        path = work / "states.npy"
        if parallel.RANK == 0 and not path.exists():
            part = path.with_suffix(".part.npy")
            width = self.model.config.hidden_size
            rows = np.lib.format.open_memmap(part, "w+", np.float16, (*tokens.shape, width))
            for chunk in batches(len(tokens), 512):
                states = self.model(input_ids=tokens[chunk].long().to(DEVICE)).last_hidden_state
                rows[chunk] = states.half().cpu().numpy()
            rows.flush()
            part.rename(path)
        parallel.barrier()
        return path


def noise_levels() -> tuple[Tensor, Tensor]:
    """Return (α, σ) of every timestep of the scheduler's variance-preserving process."""
    cumulative = make_scheduler().alphas_cumprod.float()
    return cumulative.sqrt().to(DEVICE), (1 - cumulative).sqrt().to(DEVICE)


def noise_of(seeds: range) -> Tensor:
    """Return noise (B, 4, 16, 16); every row depends only on its seed."""
    shape = (4, LATENT_SIDE, LATENT_SIDE)
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(DEVICE)


@torch.no_grad()
def teacher_latents(
    unet: UNet2DConditionModel, x: Tensor, states: Tensor, empty: Tensor, *,
    steps: int, guidance: float, start: int = 999,
) -> Tensor:  # fmt: skip
    """Deterministic Euler steps (DDIM) with classifier-free guidance and trailing timesteps.

    x: latents at timestep `start`; pure noise at 999.
    """
    alpha, sigma = noise_levels()
    times = ((start + 1) * (1 - torch.arange(steps) / steps)).round().long() - 1
    both = torch.cat([empty.expand(len(x), -1, -1), states])
    for t, following in zip(times, [*times[1:], None], strict=True):
        with autocast():
            out = unet(torch.cat([x, x]), t, both).sample
        unconditional, conditional = out.float().chunk(2)
        v = unconditional + guidance * (conditional - unconditional)
        x0 = alpha[t] * x - sigma[t] * v
        if following is not None:
            x = alpha[following] * x0 + sigma[following] * (sigma[t] * x + alpha[t] * v)
    return x0


def student_latents(unet: UNet2DConditionModel, noise: Tensor, states: Tensor) -> Tensor:
    """One step from t = 999, where α = 0 and therefore x0 = -v."""
    return -unet(noise, torch.full((len(noise),), 999, device=noise.device), states).sample


@torch.no_grad()
def consistency_latents(unet: UNet2DConditionModel, noise: Tensor, states: Tensor, *, steps: int, seed: int) -> Tensor:
    """Predict x0, add fresh noise for the next lower level, and repeat."""
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
    """(B, 4, 16, 16) -> (B, 3, 64, 64), about [-1, 1]."""
    scaled = latents.float() / vae.config.scaling_factor
    return torch.cat([vae.decode(scaled[chunk]).sample for chunk in batches(len(scaled), 64)])
