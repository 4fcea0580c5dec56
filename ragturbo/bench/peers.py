"""Others doing the same work in the same run, held to equal results before a speed-up is said."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ragturbo.bench.models import diffusers_pipeline

if TYPE_CHECKING:
    from ragturbo.model.bundle import Bundle

# DESIGN: fp16 text → image agrees with diffusers' own pipeline on the same noise to at least this.
LEAST_PSNR = 40.0


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """dB between images in [0, 1]; infinite where they are equal. A NaN anywhere gives NaN, which passes no bar."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
    return float((a - b).norm() / b.norm())


def noise_of(bundle: Bundle, seeds: list[int]) -> torch.Tensor:
    """diffusers' CPU-generator noise of these seeds, (B, c, h, w) fp32."""
    size = bundle.unet.unet.config.sample_size
    shape = (1, bundle.vae.channels, size, size)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class Diffusers:
    """diffusers' pipeline over the bundle's own weights, in one step without guidance, as the paper's SD Turbo row."""

    name = "diffusers"

    def __init__(self, bundle: Bundle, *, compile: bool = False, mode: str = "max-autotune") -> None:
        self.bundle = bundle
        self.pipe = pipe = diffusers_pipeline(bundle)
        # Copies, in the layout diffusers loads: our engine lays the bundle's own out anew, which a peer must not gain
        # from; and what a peer's compiler does to its modules must not reach ours.
        layout = torch.channels_last if compile else torch.contiguous_format
        for name in ("unet", "vae"):
            module = copy.deepcopy(getattr(pipe, name))
            setattr(pipe, name, torch.nn.Module.to(module, memory_format=layout))
        if compile:
            self.name = f"diffusers + torch.compile({mode})"
            pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
            pipe.text_encoder = torch.compile(pipe.text_encoder, mode=mode)

    def __call__(self, prompts: list[str], seeds: list[int], output_type: str = "np") -> Any:
        noise = noise_of(self.bundle, seeds).to(self.bundle.dtype)
        return self.pipe(
            prompts, latents=noise.to(self.bundle.device), num_inference_steps=1, guidance_scale=0.0,
            output_type=output_type,
        ).images  # fmt: skip


def agreement(
    ours: Callable[[list[str], list[int]], np.ndarray], theirs: Callable[..., np.ndarray], words: list[str]
) -> dict[str, float]:
    """PSNR on equal prompts and noise, and of the controls: another prompt, other noise. Images in [0, 1]."""
    seeds = list(range(len(words)))
    reference = theirs(words, seeds)
    return {
        "psnr": psnr(ours(words, seeds), reference),
        "psnr_other_prompt": psnr(ours(words[::-1], seeds), reference),
        "psnr_other_noise": psnr(ours(words, [s + 1000 for s in seeds]), reference),
    }


def equal(found: dict[str, float]) -> str | None:
    """Why these are not the same results; None where they are, and the controls are not."""
    if not found["psnr"] >= LEAST_PSNR:
        return f"{found['psnr']:.1f} dB to the reference, at least {LEAST_PSNR:.0f} are needed"
    if not found["psnr_other_noise"] < found["psnr"] - 3:
        return f"other noise passes as well ({found['psnr_other_noise']:.1f} dB): the comparison proves nothing"
    return None
