"""Measure the embedded model: `python examples/shapes/measure.py student`.

`--model` is any folder in the diffusers layout: a bundle, or the recipe's working folder (required for `lcm`). Prints
JSON with the result, the seed and the command; `--grid` also writes the first sixty pictures.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from data import batches, to_bytes, to_float, tokenize
from device import DEVICE
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from sampling import TextStates, consistency_latents, decode, noise_levels, noise_of, student_latents, teacher_latents
from settings import Settings
from torch import Tensor, nn
from torch.nn import functional as F

from ragturbo import Database
from ragturbo.evaluate.faithfulness import CATEGORIES, count_answers
from ragturbo.evaluate.names import lesson, made_up_word
from ragturbo.evaluate.recognition import recognise
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.scores import right_share
from ragturbo.evaluate.world import COLOURS, SHAPES, Noun, Scene, parse, sample_scenes
from ragturbo.machine import describe
from ragturbo.model.find import resolve
from ragturbo.model.unet import HSpaceUNet

Latents = Callable[[Tensor, Tensor, list[Scene]], Tensor]
"""(noise, text states, scenes) -> latents"""


class Model:
    def __init__(self, folder: Path) -> None:
        self.folder, self.texts = folder, TextStates(folder)
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).to(DEVICE).eval()

    def unet(self, name: str) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_pretrained(self.folder / name, torch_dtype=torch.float32).to(DEVICE).eval()

    @torch.no_grad()
    def encode(self, scenes: list[Scene]) -> Tensor:
        """Return the latents of the true pictures."""
        images = np.stack([render(scene) for scene in scenes])
        means = [self.vae.encode(to_float(images[c])).latent_dist.mean for c in batches(len(images), 64)]
        return torch.cat(means) * self.vae.config.scaling_factor

    @torch.no_grad()
    def keys(self, captions: list[str]) -> Tensor:
        """Return the retrieval keys of captions, unit vectors (B, D)."""
        ids = tokenize(self.texts.tokenizer, captions).to(DEVICE)
        pooled = [self.texts.model(input_ids=ids[c]).pooler_output for c in batches(len(ids), 256)]
        return F.normalize(torch.cat(pooled).float(), dim=-1)


def teacher(model: Model, args: argparse.Namespace) -> dict:
    unet, s = model.unet("teacher_unet"), Settings()

    def latents(noise: Tensor, states: Tensor, _: list[Scene]) -> Tensor:
        steps, guidance = args.steps or s.sampling_steps, args.guidance or s.guidance
        return teacher_latents(unet, noise, states, model.texts.empty, steps=steps, guidance=guidance)

    return _draw_and_score(model, args, latents)


def redraw(model: Model, args: argparse.Namespace) -> dict:
    """Denoise the true pictures from several noise levels, to see at which levels the teacher loses faithfulness."""
    unet, s = model.unet("teacher_unet"), Settings()
    alpha, sigma = noise_levels()

    def from_level(t: int) -> dict:
        def latents(noise: Tensor, states: Tensor, scenes: list[Scene]) -> Tensor:
            x = alpha[t] * model.encode(scenes) + sigma[t] * noise
            options = {"steps": args.steps or 20, "guidance": args.guidance or s.guidance}
            return teacher_latents(unet, x, states, model.texts.empty, start=t, **options)

        return _draw_and_score(model, args, latents)

    return {str(t): from_level(t) for t in (999, 900, 800, 700, 600, 500, 400, 300, 200)}


def student(model: Model, args: argparse.Namespace) -> dict:
    unet = model.unet("unet")
    return _draw_and_score(model, args, lambda noise, states, _: student_latents(unet, noise, states))


def lcm(model: Model, args: argparse.Namespace) -> dict:
    unet, steps = model.unet("lcm_unet"), args.steps or 4
    return _draw_and_score(
        model, args, lambda noise, states, _: consistency_latents(unet, noise, states, steps=steps, seed=args.seed)
    )


def swap(model: Model, args: argparse.Namespace) -> dict:
    """Replace the student's h by that of another prompt and noise; the loss is the information that h carries."""
    unet = HSpaceUNet(model.unet("unet"))

    def latents(noise: Tensor, states: Tensor, other: bool) -> Tensor:
        state = unet.encode(noise, torch.tensor(999, device=DEVICE), states)
        return -unet.decode(state, state.h.roll(1, 0) if other else None)

    own = _draw_and_score(model, args, lambda noise, states, _: latents(noise, states, False))
    swapped = _draw_and_score(model, args, lambda noise, states, _: latents(noise, states, True))
    return {"own": own, "swapped": swapped, "cost": own["overall"]["mean"] - swapped["overall"]["mean"]}


def autoencoder(model: Model, args: argparse.Namespace) -> dict:
    """Encode and decode the true pictures: the upper bound for all models."""
    scenes = _scenes(args)
    images = np.stack([render(scene) for scene in scenes])
    decoded = to_bytes(decode(model.vae, model.encode(scenes)))
    error = np.square(decoded.astype(np.float64) - images).mean()
    _write_grid(args, decoded)
    scores = faithfulness([scene.caption for scene in scenes], decoded)
    return {**scores, "psnr": float(10 * np.log10(255**2 / error))}


def keys(model: Model, args: argparse.Namespace) -> dict:
    """How often the nearest database caption, or one of the nearest four, names the same kinds of things."""
    scenes = _scenes(args)
    database = Database.open(model.folder / "database")
    named = [parse(record.caption).kinds for record in database.records(database.ids, thumbnails=False)]
    query, stored = model.keys([scene.caption for scene in scenes]), database.keys(database.ids).to(DEVICE)
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


def probe(model: Model, args: argparse.Namespace) -> dict:
    """How well shape and colour of a thing can be read from h_retr, if the caption only names it (t = 0)."""
    rng = np.random.default_rng(args.seed)
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    shown = [kinds[i] for i in rng.integers(len(kinds), size=5 * args.count)]
    nouns = [Noun(*kind, name=made_up_word(rng, "eval")) for kind in shown]
    scenes = [lesson(noun, args.seed * 1_000_000 + i) for i, noun in enumerate(nouns)]
    unet, features = HSpaceUNet(model.unet("unet")), []
    with torch.no_grad():
        for chunk in batches(len(scenes), 64):
            states = model.texts.states([scene.caption for scene in scenes[chunk]])
            h = unet.retrieval_features(model.encode(scenes[chunk]), states)
            features.append(torch.cat([h.mean(1), h.amax(1), h.amin(1)], 1))
    x = torch.cat(features)
    tested = slice(4 * args.count, None)
    return {
        "shape": _read(x, [SHAPES.index(shape) for shape, _ in shown], tested, args.seed),
        "colour": _read(x, [COLOURS.index(colour) for _, colour in shown], tested, args.seed),
    }


def _read(x: Tensor, labels: list[int], tested: slice, seed: int) -> dict[str, float]:
    """Train a small network on the rows before `tested`; returns its accuracy on the others with the 95 % interval."""
    y, split = torch.tensor(labels, device=x.device), tested.start
    x = (x - x[:split].mean(0)) / x[:split].std(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(x.shape[1], 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, 8)).to(x.device)
        optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.01)
        for _ in range(60):
            for rows in torch.randperm(split).split(64):
                loss = F.cross_entropy(net(x[rows]), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    right = net.eval()(x[tested]).argmax(1) == y[tested]
    return _mean_with_interval(right.float().tolist())


def metric(model: Model, args: argparse.Namespace) -> dict:
    """Both ends of the scale: the true pictures, and every caption with the picture of the next one."""
    scenes = _scenes(args)
    captions, pictures = [scene.caption for scene in scenes], np.stack([render(scene) for scene in scenes])
    shifted = captions[1:] + captions[:1]
    return {"true": faithfulness(captions, pictures), "chance": faithfulness(shifted, pictures)}


MEASURES = {
    "metric": metric, "autoencoder": autoencoder, "teacher": teacher, "redraw": redraw, "student": student, "lcm": lcm,
    "swap": swap, "keys": keys, "probe": probe,
}  # fmt: skip


def faithfulness(captions: Sequence[str], pictures: np.ndarray) -> dict:
    """Score picture i against caption i.

    `overall` is the mean share of right answers, also for captions without (`common`) and with (`rare`) a rare kind;
    `exact` is the share of captions with only right answers; `categories` are shares of right answers.
    """
    shares: dict[str, list[float]] = {"overall": [], "exact": [], "common": [], "rare": []}
    categories: dict[str, list[float]] = {name: [] for name in CATEGORIES}
    for caption, picture in zip(captions, pictures, strict=True):
        meaning = parse(caption)
        counts = count_answers(meaning, recognise(picture))
        shares["overall"].append(right_share(counts))
        shares["exact"].append(float(shares["overall"][-1] == 1))
        shares["rare" if meaning.rare else "common"].append(shares["overall"][-1])
        for name, (right, asked) in counts.items():
            categories[name] += [1.0] * right + [0.0] * (asked - right)
    means = {name: _mean_with_interval(values) for name, values in shares.items()}
    return {**means, "categories": {name: _mean_with_interval(values) for name, values in categories.items()}}


def _mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Return mean, half width of the 95 % interval and count."""
    if not values:
        return {"mean": float("nan"), "interval": float("nan"), "count": 0}
    interval = float(1.96 * np.std(values) / np.sqrt(len(values)))
    return {"mean": float(np.mean(values)), "interval": interval, "count": len(values)}


def _scenes(args: argparse.Namespace) -> list[Scene]:
    return sample_scenes(args.count, args.seed, "eval")


def _draw_and_score(model: Model, args: argparse.Namespace, latents: Latents) -> dict:
    scenes = _scenes(args)
    images = []
    for chunk in batches(len(scenes), 50):
        captions = [scene.caption for scene in scenes[chunk]]
        noise = noise_of(range(args.seed * 1_000_000 + chunk.start, args.seed * 1_000_000 + chunk.stop))
        with torch.no_grad():
            states = model.texts.states(captions)
            images.append(to_bytes(decode(model.vae, latents(noise, states, scenes[chunk]))))
    pictures = np.concatenate(images)
    _write_grid(args, pictures)
    return faithfulness([scene.caption for scene in scenes], pictures)


def _write_grid(args: argparse.Namespace, pictures: np.ndarray) -> None:
    if args.grid:
        starts = range(0, min(len(pictures), 60) // 10 * 10, 10)
        rows = [np.concatenate(list(pictures[i : i + 10]), axis=1) for i in starts]
        Image.fromarray(np.concatenate(rows)).save(args.grid)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=MEASURES)
    parser.add_argument("--model", default="shapes", help="a folder, or the embedded model")
    parser.add_argument("--count", type=int, default=1000, help="number of unseen captions")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, help="default: settings.sampling_steps (redraw: 20, lcm: 4)")
    parser.add_argument("--guidance", type=float, help="the teacher's; default: settings.guidance")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--grid", type=Path, help="write the first sixty pictures to this file")
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
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
