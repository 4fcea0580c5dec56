"""What the embedded model can do, in numbers: `python examples/shapes/measure.py student`.

`--model` is any folder in the diffusers layout: a bundle, or the recipe's working folder, where alone `lcm` has its
UNet. Each measurement writes JSON with the seeds and the command; `--grid` also writes the first pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from data import batches, to_bytes, to_float, tokenize
from device import DEVICE
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from sampling import Texts, consistency_latents, decode, noise_levels, noise_of, student_latents, teacher_latents
from settings import Settings
from torch import Tensor
from torch.nn import functional as F

from ragturbo import Database
from ragturbo.evaluate.drawing import render_array
from ragturbo.evaluate.faithfulness import faithfulness
from ragturbo.evaluate.world import Scene, parse, sample_scenes
from ragturbo.machine import describe
from ragturbo.model import HSpaceUNet
from ragturbo.model.source import resolve


class Model:
    def __init__(self, folder: Path) -> None:
        self.folder, self.texts = folder, Texts(folder)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(DEVICE).eval()

    def unet(self, name: str) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(self.folder / name, torch_dtype=torch.float32).to(DEVICE).eval()

    @torch.no_grad()
    def encode(self, scenes: list[Scene]) -> Tensor:
        """Their true pictures' latents."""
        images = np.stack([render_array(scene) for scene in scenes])
        means = [self.vae.encode(to_float(images[c])).latent_dist.mean for c in batches(len(images), 64)]
        return torch.cat(means) * self.vae.config.scaling_factor


def teacher(model: Model, args: argparse.Namespace) -> dict:
    unet, s = model.unet("teacher_unet"), Settings()

    def latents(noise: Tensor, states: Tensor, _: list[Scene]) -> Tensor:
        steps, guidance = args.steps or s.sampling_steps, args.guidance or s.guidance
        return teacher_latents(unet, noise, states, model.texts.empty, steps=steps, guidance=guidance)

    return _score(model, args, latents)


def redraw(model: Model, args: argparse.Namespace) -> dict:
    """The teacher goes on from the true picture, noised to a level: where on its way faithfulness is lost."""
    unet, s = model.unet("teacher_unet"), Settings()
    alpha, sigma = noise_levels()

    def from_level(t: int) -> dict:
        def latents(noise: Tensor, states: Tensor, scenes: list[Scene]) -> Tensor:
            x = alpha[t] * model.encode(scenes) + sigma[t] * noise
            how = {"steps": args.steps or 20, "guidance": args.guidance or s.guidance}
            return teacher_latents(unet, x, states, model.texts.empty, start=t, **how)

        return _score(model, args, latents)

    return {str(t): from_level(t) for t in (999, 900, 800, 700, 600, 500, 400, 300, 200)}


def student(model: Model, args: argparse.Namespace) -> dict:
    unet = model.unet("unet")
    return _score(model, args, lambda noise, states, _: student_latents(unet, noise, states))


def lcm(model: Model, args: argparse.Namespace) -> dict:
    """The recipe's consistency model; --model is the recipe's working folder, where it lies."""
    unet, steps = model.unet("lcm_unet"), args.steps or 4
    return _score(
        model, args, lambda noise, states, _: consistency_latents(unet, noise, states, steps=steps, seed=args.seed)
    )


def swap(model: Model, args: argparse.Namespace) -> dict:
    """The student with every picture's h taken from another prompt and noise: what is lost is what h carries."""
    unet = HSpaceUNet(model.unet("unet"))

    def latents(noise: Tensor, states: Tensor, other: bool) -> Tensor:
        state = unet.encode(noise, torch.tensor(999, device=DEVICE), states)
        return -unet.decode(state, state.h.roll(1, 0) if other else None)

    own = _score(model, args, lambda noise, states, _: latents(noise, states, False))
    swapped = _score(model, args, lambda noise, states, _: latents(noise, states, True))
    return {"own": own, "swapped": swapped, "cost": own["overall"]["mean"] - swapped["overall"]["mean"]}


def autoencoder(model: Model, args: argparse.Namespace) -> dict:
    """The ceiling: true pictures, encoded and decoded."""
    scenes = _scenes(args)
    images = np.stack([render_array(scene) for scene in scenes])
    back = to_bytes(decode(model.vae, model.encode(scenes)))
    error = np.square(back.astype(np.float64) - images).mean()
    _grid(args, back)
    report = faithfulness([scene.caption for scene in scenes], back).as_dict()
    return {**report, "psnr": float(10 * np.log10(255**2 / error))}


def keys(model: Model, args: argparse.Namespace) -> dict:
    """How often a caption's nearest database caption, or one of the four nearest, names the same kinds of things."""
    scenes = _scenes(args)
    database = Database.open(model.folder / "database")
    named = [parse(record.caption).kinds for record in database.records(database.ids, thumbnails=False)]
    query, stored = _keys(model, [scene.caption for scene in scenes]), database.keys(database.ids).to(DEVICE)
    scores, top = (query @ stored.T).topk(4, dim=-1)
    same = [[named[j] == scene.meaning.kinds for j in row] for scene, row in zip(scenes, top.tolist(), strict=True)]
    hits = [any(row) for row in same]
    rare = [hit for hit, scene in zip(hits, scenes, strict=True) if scene.meaning.rare]
    return {
        "pairs": len(database),
        "top1": float(np.mean([row[0] for row in same])),
        "top4": float(np.mean(hits)),
        "top4_rare": float(np.mean(rare)),
        "cosine_of_nearest": np.quantile(scores[:, 0].cpu().numpy(), (0.05, 0.5, 0.95)).round(4).tolist(),
        "cosine_at_random": np.quantile((query @ stored.T).cpu().numpy(), (0.05, 0.5, 0.95)).round(4).tolist(),
    }


def metric(model: Model, args: argparse.Namespace) -> dict:
    """Both ends of the scale: the true pictures, and chance, which is every caption asked of the next one's picture."""
    scenes = _scenes(args)
    captions, pictures = [scene.caption for scene in scenes], np.stack([render_array(scene) for scene in scenes])
    shifted = captions[1:] + captions[:1]
    return {
        "true": faithfulness(captions, pictures).as_dict(),
        "chance": faithfulness(shifted, pictures).as_dict(),
    }


MEASURES = {
    "metric": metric, "autoencoder": autoencoder, "teacher": teacher, "redraw": redraw, "student": student, "lcm": lcm,
    "swap": swap, "keys": keys,
}  # fmt: skip


def _scenes(args: argparse.Namespace) -> list[Scene]:
    return sample_scenes(args.count, args.seed, "eval")


def _keys(model: Model, captions: list[str]) -> Tensor:
    with torch.no_grad():
        ids = tokenize(model.texts.tokenizer, captions).to(DEVICE)
        pooled = [model.texts.model(input_ids=ids[c]).pooler_output for c in batches(len(ids), 256)]
    return F.normalize(torch.cat(pooled).float(), dim=-1)


def _score(model: Model, args: argparse.Namespace, latents) -> dict:
    scenes = _scenes(args)
    images = []
    for chunk in batches(len(scenes), 50):
        captions = [scene.caption for scene in scenes[chunk]]
        noise = noise_of(range(args.seed * 1_000_000 + chunk.start, args.seed * 1_000_000 + chunk.stop))
        with torch.no_grad():
            states = model.texts.states(captions)
            images.append(to_bytes(decode(model.vae, latents(noise, states, scenes[chunk]))))
    pictures = np.concatenate(images)
    _grid(args, pictures)
    return faithfulness([scene.caption for scene in scenes], pictures).as_dict()


def _grid(args: argparse.Namespace, pictures: np.ndarray) -> None:
    if args.grid:
        starts = range(0, min(len(pictures), 60) // 10 * 10, 10)
        rows = [np.concatenate(list(pictures[i : i + 10]), axis=1) for i in starts]
        Image.fromarray(np.concatenate(rows)).save(args.grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--model", default="shapes", help="a folder, or the embedded model")
    parser.add_argument("--count", type=int, default=1000, help="unseen captions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, help="the teacher's; default: settings.sampling_steps (redraw: 20, lcm: 4)"
    )
    parser.add_argument("--guidance", type=float, help="the teacher's; default: settings.guidance")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grid", type=Path, help="write the first sixty pictures here")
    parser.add_argument("--out", type=Path, help="write the JSON here as well")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    begun = time.monotonic()
    result = {
        "measure": args.measure, "captions": args.count, "seed": args.seed,
        "result": MEASURES[args.measure](Model(resolve(args.model)), args),
        "seconds": round(time.monotonic() - begun, 1), "context": describe(),
    }  # fmt: skip
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
