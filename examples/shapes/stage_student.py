"""Make the training data of the student and distil it, with the library's commands.

`ragturbo data teacher`, `data encode` and `data lpips`, then `ragturbo train` in mode student with the configuration
`shapes`. The student starts with the teacher's weights.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import parallel
import torch
from device import DEVICE, attention
from diffusers import UNet2DConditionModel
from loop import head
from PIL import Image
from settings import Settings
from stage_bundle import save_bundle

from ragturbo.evaluate.world import sample_scene
from ragturbo.train import LADDTrainer, load_config
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.stats import STATS
from ragturbo.train.teacher import make_teacher_data
from ragturbo.train.train_vgg import train_vgg

log = logging.getLogger("ragturbo.recipe")
BASE, START, PAIRS, REAL, VGG = "base", "student_start", "pairs", "real", "vgg.safetensors"


def make_pairs(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Write work/pairs (teacher latents), work/real (encoded pictures) and work/vgg.safetensors (latent LPIPS)."""
    captions = json.loads((work / "captions.json").read_text())
    if parallel.RANK == 0:
        save_bundle(work, work / "teacher_unet", work / BASE)
    parallel.barrier()
    model, device = str(work / BASE), str(DEVICE)
    batch = 512 if DEVICE.type == "cuda" else 64
    # The teacher draws rare kinds well, so that the student need not miss them.
    prompts = [sample_scene(s.seed * 13_000_000 + i, "train").caption for i in range(s.pairs)]
    make_teacher_data(
        prompts, work / PAIRS, model=model, guidance=s.guidance, steps=s.pair_steps, batch=batch, store_text=True,
        precision="bfloat16", device=device,
    )  # fmt: skip
    pictures = list(_pictures(work, captions, s))
    make_encoded_data(pictures, work / REAL, model=model, min_size=1, batch=batch, store_text=True, device=device)
    parallel.barrier()
    if parallel.RANK == 0 and not (work / VGG).exists():
        result = train_vgg(work / PAIRS, work / VGG, width=8, steps=s.lpips_steps, seed=s.seed, device=device)
        log.info("latent LPIPS: %s", result)


def _pictures(work: Path, captions: list[str], s: Settings) -> Iterator[tuple[str, Image.Image]]:
    images = np.load(work / "images.npy", mmap_mode="r")
    for row in range(s.scenes - s.real, s.scenes):
        yield captions[row], Image.fromarray(images[row])


def distil_student(work: Path, s: Settings, minutes: float | None = None) -> None:
    """Train in work/student and write work/unet. An adopted student goes on, and the result is the mean of both."""
    start, model = work / START, work / BASE
    if start.exists():
        model = work / "base_student"
        if parallel.RANK == 0:
            save_bundle(work, start, model)
        parallel.barrier()
    changes = [
        "mode=student", f"model={model}", f"seed={s.seed}", *data_settings(work), "student.adapter=none",
        "student.lora.rank=0", "student.retrieval_dropout=0", f"optim.lr={s.student_rate}", "optim.weight_decay=0.01",
        f"loop.max_steps={s.student_steps}", f"loop.batch={s.student_batch}",
        f"loop.micro_batch={s.student_batch // parallel.WORLD}", "loop.ema=0.998", "loop.precision=bf16",
    ]  # fmt: skip
    folder = train("student", work, changes)
    if parallel.RANK == 0:
        shutil.copytree(folder / "unet", work / "unet", dirs_exist_ok=True)
        if start.exists():
            # The longer training fits its pairs better, and unseen captions no better; the mean is better than either.
            average(work / "unet", start)


def average(folder: Path, other: Path) -> None:
    """Replace the UNet in `folder` by the mean of its weights and those of another one."""
    unet, second = (UNet2DConditionModel.from_pretrained(f, torch_dtype=torch.float32) for f in (folder, other))
    weights = second.state_dict()
    unet.load_state_dict({name: (value + weights[name]) / 2 for name, value in unet.state_dict().items()})
    unet.save_pretrained(folder)


def data_settings(work: Path) -> list[str]:
    sources = f"[{{path: {work / PAIRS}, weight: 3}}, {{path: {work / REAL}, weight: 1}}]"
    return [f"data.sources={sources}", f"loss.lpips_weights={work / VGG}"]


def train(name: str, work: Path, changes: list[str]) -> Path:
    """Train in work/name with the configuration `shapes`, log the last losses, and return the exported folder."""
    with attention():
        folder = LADDTrainer(load_config("shapes", changes), work / name, device=DEVICE, resume=True).train()
    if parallel.RANK == 0:
        last = json.loads((work / name / STATS).read_text("utf-8").splitlines()[-1])
        (work / f"{name}.jsonl").write_text(json.dumps({**last, "commit": head()}) + "\n")
    return folder
