"""Write the bundle that the library loads, and build its databases."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from loop import head
from networks import make_scheduler
from PIL import Image
from settings import Settings
from stage_teacher import START
from transformers import CLIPTextModel, CLIPTokenizer

from ragturbo import Database
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.world import Scene, all_kind_sets, sample_scene, vocabulary
from ragturbo.model.bundle import Bundle
from ragturbo.model.info import BundleInfo
from ragturbo.model.text import TextEncoder
from ragturbo.model.unet import HSpaceUNet
from ragturbo.model.vae import VAE

log = logging.getLogger("ragturbo.recipe")
# Logs of the training stages; their last rows go into the bundle's provenance.
LOGS = ("text", "vae", "decoder", "tiny", START, "teacher", "student_start", "student", "align", "lcm")


def write_bundle(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Write work/bundle: fp16 weights in the diffusers layout, with settings and last losses as provenance."""
    folder = save_bundle(work, work / "unet", work / "bundle", torch.float16, provenance(work, s))
    for path in folder.glob("*/config.json"):
        # Do not publish local paths.
        config = {key: value for key, value in json.loads(path.read_text()).items() if key != "_name_or_path"}
        path.write_text(json.dumps(config, indent=2) + "\n")
    log.info("bundle: %.1f MB without its database", size_of(folder) / 1e6)


def save_bundle(
    work: Path, unet: Path, folder: Path, dtype: torch.dtype = torch.float32, provenance: dict | None = None
) -> Path:
    """Save the parts in `work` and a student UNet as a bundle."""
    bundle = Bundle(
        name="shapes",
        info=BundleInfo(distilled=True, base_model="shapes", provenance=provenance or {}),
        text=TextEncoder(
            CLIPTokenizer.from_pretrained(work / "tokenizer"),
            CLIPTextModel.from_pretrained(work / "text_encoder", dtype=dtype).eval(),
        ),
        unet=HSpaceUNet(UNet2DConditionModel.from_pretrained(unet, torch_dtype=dtype).eval()),
        vae=VAE(AutoencoderKL.from_pretrained(work / "vae", torch_dtype=dtype).eval()),
        scheduler=make_scheduler(),
        teacher=UNet2DConditionModel.from_pretrained(work / "teacher_unet", torch_dtype=dtype).eval(),
    )
    bundle.save(folder)
    AutoencoderTiny.from_pretrained(work / "vae_tiny", torch_dtype=dtype).save_pretrained(folder / "vae_tiny")
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).write_bytes((work / "tokenizer" / name).read_bytes())
    return folder


def build_database(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Build work/bundle/database: int8 features, no index because exact search is fast enough at this size."""
    folder = work / "bundle"
    Database.build(
        pairs(s.database_pairs, s), folder / "database", model=folder, feature_dtype="int8", index=False, batch_size=64,
        resume=False,
    )  # fmt: skip
    log.info("bundle: %.1f MB with its database", size_of(folder) / 1e6)


def build_large_database(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Build work/database-large, with an index, for evaluations."""
    Database.build(
        pairs(s.large_database_pairs, s), work / "database-large", model=work / "bundle", feature_dtype="int8",
        batch_size=64, resume=False,
    )  # fmt: skip


def pairs(count: int, s: Settings) -> Iterator[tuple[str, Image.Image]]:
    for scene in database_scenes(count, s):
        yield scene.caption, Image.fromarray(render(scene))


def database_scenes(count: int, s: Settings) -> Iterator[Scene]:
    """Yield scenes of every set of kinds in turn, so that rare kinds are as frequent as the others."""
    sets = all_kind_sets()
    order = np.random.default_rng(s.seed).permutation(len(sets))
    for i in range(count):
        yield sample_scene(s.seed * 11_000_000 + i, "database", kinds=sets[order[i % len(sets)]])


def provenance(work: Path, s: Settings) -> dict:
    """Return the recipe's commit and settings, and the last losses of every stage."""
    stages = {}
    for name in LOGS:
        path = work / f"{name}.jsonl"
        if path.exists():
            stages[name] = json.loads(path.read_text().splitlines()[-1])
    return {
        "recipe": "examples/shapes", "commit": head(), "settings": asdict(s), "stages": stages, "words": vocabulary(),
    }  # fmt: skip


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
