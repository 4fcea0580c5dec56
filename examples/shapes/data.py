"""The training data as memory-mapped arrays: images, tokens and latents."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from device import DEVICE, autocast
from diffusers import AutoencoderKL
from settings import Settings
from torch import Tensor
from transformers import CLIPTokenizer

from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.world import RARE, Scene, sample_scene

log = logging.getLogger("ragturbo.recipe")


def training_scene(i: int, s: Settings) -> Scene:
    """Return scene i of the training set; only the first `rare_glimpses` scenes per rare kind show rare kinds."""
    rare = sorted(RARE)
    if i < len(rare) * s.rare_glimpses:
        return sample_scene(s.seed * 1_000_000 + i, "train", kinds=(rare[i % len(rare)],))
    return sample_scene(s.seed * 1_000_000 + i, "train", rare=False)


def draw(work: Path, tokenizer: CLIPTokenizer, s: Settings) -> None:
    """Write images.npy (N, 64, 64, 3) uint8, tokens.npy (N, L) int16 and captions.json."""
    if (work / "captions.json").exists():
        return
    images = np.lib.format.open_memmap(work / "images.npy", "w+", np.uint8, (s.scenes, 64, 64, 3))
    captions: list[str] = []
    with get_context("fork").Pool(os.cpu_count()) as pool:
        chunks = [(range(i, min(i + 1000, s.scenes)), s) for i in range(0, s.scenes, 1000)]
        for (chunk, _), (drawn, texts) in zip(chunks, pool.imap(_draw_chunk, chunks), strict=True):
            images[chunk.start : chunk.stop] = drawn
            captions += texts
    images.flush()
    np.save(work / "tokens.npy", tokenize(tokenizer, captions).numpy().astype(np.int16))
    (work / "captions.json").write_text(json.dumps(captions))
    log.info("drew %d scenes", s.scenes)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]


def to_float(images: np.ndarray | Tensor) -> Tensor:
    """(B, 64, 64, 3) uint8 -> (B, 3, 64, 64) in [-1, 1], on the device."""
    pixels = images if isinstance(images, Tensor) else torch.tensor(images)
    return pixels.to(DEVICE).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def to_bytes(images: Tensor) -> np.ndarray:
    """(B, 3, 64, 64) in [-1, 1] -> (B, 64, 64, 3) uint8."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def encode(work: Path, vae: AutoencoderKL, s: Settings) -> None:
    """Write latents.npy (N, 4, 16, 16) fp16: the encoder's means, scaled to unit variance."""
    if (work / "latents.npy").exists():
        return
    images = np.load(work / "images.npy", mmap_mode="r")[: s.scenes]
    part = work / "latents.part.npy"
    latents = np.lib.format.open_memmap(part, "w+", np.float16, (len(images), 4, 16, 16))
    for chunk in batches(len(images), 128):
        with autocast():
            mean = vae.encode(to_float(images[chunk])).latent_dist.mean
        latents[chunk] = (mean.float() * vae.config.scaling_factor).half().cpu().numpy()
    latents.flush()
    part.rename(work / "latents.npy")
    log.info("encoded %d scenes", len(images))


def batches(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def _draw_chunk(job: tuple[range, Settings]) -> tuple[np.ndarray, list[str]]:
    scenes = [training_scene(i, job[1]) for i in job[0]]
    return np.stack([render(scene) for scene in scenes]), [scene.caption for scene in scenes]
