"""diffusers' own pipeline as a baseline, and the comparison of its results with ours."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ragturbo.bench.agreement import noise_of, relative_error
from ragturbo.model.bundle import Bundle

# (prompts, seeds, "latent" or "np") -> latents or images
Draw = Callable[[list[str], list[int], str], Any]


def diffusers_pipeline(bundle: Bundle) -> Any:
    """Return diffusers' StableDiffusionPipeline over the bundle's modules, which become diffusers' own classes."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    bundle.to_diffusers()
    pipe: Any = StableDiffusionPipeline(
        vae=bundle.vae.module,
        text_encoder=bundle.text.text_encoder,
        tokenizer=bundle.text.tokenizer,
        unet=bundle.unet.unet,
        scheduler=EulerDiscreteScheduler.from_config(bundle.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


class Diffusers:
    """diffusers' pipeline with the bundle's weights: one step without guidance, like the paper's SD Turbo row."""

    name = "diffusers"

    def __init__(self, bundle: Bundle, *, compile: bool = False, mode: str = "reduce-overhead") -> None:
        """
        Args:
            compile: run UNet, VAE decoder and text encoder through torch.compile, in channels_last.
            mode: torch.compile's mode. "reduce-overhead" records CUDA graphs without minutes of autotuning.
        """
        self.bundle, self.compiled = bundle, compile
        self.pipe = pipe = diffusers_pipeline(bundle)
        # Copies in the layout that diffusers loads: our engine changes the layout of the bundle's own modules, and
        # torch.compile changes the modules themselves.
        layout = torch.channels_last if compile else torch.contiguous_format
        for name in ("unet", "vae"):
            module = copy.deepcopy(getattr(pipe, name))
            setattr(pipe, name, torch.nn.Module.to(module, memory_format=layout))
        if compile:
            self.name = f"diffusers + torch.compile({mode}, channels_last)"
            pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True)
            pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True)
            pipe.text_encoder = torch.compile(pipe.text_encoder, mode=mode)

    def __call__(self, prompts: list[str], seeds: list[int], output_type: str = "np") -> Any:
        noise = noise_of(self.bundle, seeds).to(self.bundle.dtype)
        if self.compiled:
            # One image is one step: otherwise each compiled module starts a step and may overwrite the outputs of the
            # module before it.
            torch.compiler.cudagraph_mark_step_begin()
        return self.pipe(
            prompts, latents=noise.to(self.bundle.device), num_inference_steps=1, guidance_scale=0.0,
            output_type=output_type,
        ).images  # fmt: skip


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the PSNR in dB of images in [0, 1]; infinity if equal, NaN if a value is NaN."""
    error = float(np.mean((ours.astype(np.float64) - theirs.astype(np.float64)) ** 2))
    return math.inf if error == 0 else -10 * math.log10(error)


def agreement(ours: Draw, theirs: Draw, words: list[str], others: list[str]) -> dict[str, float]:
    """Return the latents' relative error and the images' PSNR for equal prompts and noise, and for the controls.

    PSNR compares the VAEs. With random weights only the latents show whether the prompt had an effect.

    Args:
        others: other prompts, for the control.
    """
    seeds = list(range(len(words)))
    other_seeds = [seed + 1000 for seed in seeds]
    reference, image = theirs(words, seeds, "latent"), theirs(words, seeds, "np")
    return {
        "error": relative_error(ours(words, seeds, "latent"), reference),
        "error_other_prompt": relative_error(ours(others, seeds, "latent"), reference),
        "error_other_noise": relative_error(ours(words, other_seeds, "latent"), reference),
        "psnr": psnr(ours(words, seeds, "np"), image),
        "psnr_other_noise": psnr(ours(words, other_seeds, "np"), image),
    }
