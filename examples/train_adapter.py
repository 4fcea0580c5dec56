"""From nothing to a trained adapter in ten minutes on two CPU cores: python examples/train_adapter.py --out runs/first

The adapter learns to draw what a made-up word stands for. A training prompt is "a zib left of a blue square", and the
database has one picture with the caption "a zib". The test has other words, of which only pictures tell what to draw.
Run it again after a kill, and it continues.

Each command is printed as it runs. For your own model, use the same commands with your prompts, pictures and database;
`data relabel` and `loss.hspace` are only needed because teacher and student get different prompts here.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ragturbo import Generator, cli
from ragturbo.cli.grid import labelled
from ragturbo.errors import RagTurboError
from ragturbo.evaluate.faithfulness import Question, answer, count_answers
from ragturbo.evaluate.names import describe_names, lesson, named, sample_named_scene
from ragturbo.evaluate.recognition import recognise
from ragturbo.evaluate.rendering import render
from ragturbo.evaluate.scores import right_share
from ragturbo.evaluate.table import estimate
from ragturbo.evaluate.world import Noun, Scene, sample_scene
from ragturbo.machine import describe

MODEL = "shapes"
BATCH = 8


def named_scenes(count: int, seed: int, split: str) -> list[Scene]:
    """Scenes whose caption has one made-up word, each another one."""
    scenes: dict[str, Scene] = {}
    while len(scenes) < count:
        scene = sample_named_scene(seed, split)
        scenes.setdefault(str(named(scene.meaning)[0].name), scene)
        seed += 1
    return list(scenes.values())


def lessons(scenes: Sequence[Scene], seed: int) -> list[Scene]:
    """For each scene, a picture of what its word stands for, with a caption that only names it."""
    return [lesson(named(scene.meaning)[0], seed + i) for i, scene in enumerate(scenes)]


def described(scene: Scene) -> str:
    """The caption with colour and shape in place of the word."""
    return describe_names(scene.caption, named(scene.meaning))


def write_pairs(folder: Path, scenes: Iterable[Scene]) -> None:
    """Write pictures with their captions beside them, as `db build` and `data encode` read them."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, scene in enumerate(scenes):
        Image.fromarray(render(scene)).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(scene.caption)


def draw_inputs(out: Path, options: argparse.Namespace, test: Sequence[Scene]) -> None:
    """Write what a user brings: prompts, pictures and captions."""
    settings = {name: getattr(options, name) for name in ("pairs", "pictures", "steps", "batch", "prompts")}
    done = out / "example.json"
    if done.exists():
        if (before := json.loads(done.read_text())) != settings:
            raise SystemExit(f"{out} was made with {before}, not {settings}: use those, or another --out")
        return
    scenes = named_scenes(options.pairs, 10_000_000, "train")
    write_pairs(out / "lessons", lessons(scenes, 20_000_000))
    write_pairs(out / "pictures", (sample_scene(30_000_000 + i, "train") for i in range(options.pictures)))
    write_pairs(out / "test-lessons", lessons(test, 50_000_000))
    (out / "prompts.txt").write_text("\n".join(map(described, scenes)) + "\n")
    (out / "named.txt").write_text("\n".join(scene.caption for scene in scenes) + "\n")
    done.write_text(json.dumps(settings))


def run(*arguments: Any) -> None:
    """Run a `ragturbo` command in this process, which imports torch once, and print it."""
    texts = [str(argument) for argument in arguments]
    print(f"\n$ {shlex.join(['ragturbo', *texts])}", flush=True)
    began = time.monotonic()
    cli.app(texts, standalone_mode=False)
    print(f"  ({time.monotonic() - began:.0f} s)", flush=True)


def train(out: Path, options: argparse.Namespace) -> Path:
    """Make the training data, train, and return the folder of the adapter. What is there already is kept."""
    model, device = ("--model", MODEL), ("--device", "cpu")
    data, database = out / "data", out / "database"
    run("db", "build", out / "lessons", "--out", database, *model, "--no-index", *device)
    run("db", "build", out / "test-lessons", "--out", out / "test-database", *model, "--no-index", *device)
    # Few steps and little guidance are enough for this teacher; a real one takes the defaults.
    run("data", "teacher", out / "prompts.txt", "--out", data / "teacher", *model, "--guidance", 3, "--steps", 10,
        "--batch", 50, "--shard-size", 250, "--store-text", *device)  # fmt: skip
    # The teacher drew what the words mean; the student gets the words.
    run("data", "relabel", data / "teacher", out / "named.txt", "--out", data / "named", *model, *device)
    run("data", "encode", out / "pictures", "--out", data / "real", *model, "--min-size", 64, "--store-text", *device)
    for name in ("named", "real"):
        run("data", "neighbors", data / name, "--database", database, *model, "-k", 1, "--retriever", "hybrid", *device)
    if not (data / "vgg.safetensors").exists():
        run("data", "lpips", data / "teacher", "--out", data / "vgg.safetensors", "--width", 8, "--steps",
            min(200, options.steps), *device)  # fmt: skip
    folder = out / "run"
    if (folder / "config.yaml").exists():
        run("train", "--out", folder, "--resume", *device)
        return folder / "export"
    settings = {
        "database": database,
        "data.sources": f"[{{path: {data / 'named'}, weight: 3}}, {{path: {data / 'real'}, weight: 1}}]",
        "loss.lpips_weights": data / "vgg.safetensors", "loss.hspace": 1,
        # Without a LoRA, a picture without retrieval stays the student's.
        "student.lora.rank": 0, "discriminator.stages": "[mid]", "optim.lr": 1e-3,
        "loop.batch": options.batch, "loop.max_steps": options.steps, "loop.save_every": 50,
    }  # fmt: skip
    changes = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    run("train", MODEL, "--out", folder, *changes, *device)
    return folder / "export"


def draw(out: Path, prompts: Sequence[str], adapter: Path | None, **call: Any) -> np.ndarray:
    """Draw every prompt from noise of its own -> (N, 64, 64, 3) uint8."""
    database, pictures = out / "test-database", []
    with Generator.from_pretrained(MODEL, adapter=adapter, database=database, retriever="hybrid", device="cpu") as gen:
        for i in range(0, len(prompts), BATCH):
            some = list(prompts[i : i + BATCH])
            seeds = [60_000_000 + i + j for j in range(len(some))]
            pictures.append(gen(some, seed=seeds, output_type="uint8", **call).images)
    return np.concatenate(pictures)


def named_right(scenes: Sequence[Scene], pictures: np.ndarray) -> list[float]:
    """Whether each picture shows a thing of the shape and colour that the word of its prompt stands for."""
    nouns = [named(scene.meaning)[0] for scene in scenes]
    asked = [Question("colour", "yes", (Noun(noun.shape, noun.colour),)) for noun in nouns]
    return [float(answer(q, recognise(picture)) == "yes") for q, picture in zip(asked, pictures, strict=True)]


def all_right(scenes: Sequence[Scene], pictures: np.ndarray) -> list[float]:
    """The share of right answers about each picture of an ordinary caption."""
    pairs = zip(scenes, pictures, strict=True)
    return [right_share(count_answers(scene.meaning, recognise(picture))) for scene, picture in pairs]


def measure(out: Path, test: Sequence[Scene], adapter: Path) -> dict[str, Any]:
    """Draw the test prompts with and without the adapter, write a grid of the first, and return the scores."""
    words, plain = [scene.caption for scene in test], [sample_scene(70_000_000 + i, "eval") for i in range(len(test))]
    without, trained = draw(out, words, None, mode="none"), draw(out, words, adapter)
    scores = {
        "word, without retrieval": named_right(test, without),
        "word, trained adapter": named_right(test, trained),
        "word replaced by a description": named_right(test, draw(out, [described(s) for s in test], None, mode="none")),
    }
    captions = [scene.caption for scene in plain]
    scores["ordinary caption, without retrieval"] = all_right(plain, draw(out, captions, None, mode="none"))
    scores["ordinary caption, trained adapter"] = all_right(plain, draw(out, captions, adapter))
    rows = []
    for scene, shown, before, after in zip(test[:5], lessons(test, 50_000_000), without, trained, strict=False):
        cells = [(Image.fromarray(render(shown)), f"in the database: {shown.caption}")]
        cells.append((Image.fromarray(before), f"without retrieval: {scene.caption}"))
        rows.append(np.asarray(labelled([*cells, (Image.fromarray(after), f"trained adapter: {scene.caption}")])))
    Image.fromarray(np.concatenate(rows)).save(out / "grid.png")
    return {name: vars(estimate(values)) for name, values in scores.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/first"))
    parser.add_argument("--pairs", type=int, default=1000, help="training prompts, each with a picture of its word")
    parser.add_argument("--pictures", type=int, default=500, help="real pictures for the discriminator")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=200, help="prompts of the test")
    options = parser.parse_args(argv)
    began, out = time.monotonic(), options.out
    resumed = (out / "example.json").exists()
    test = named_scenes(options.prompts, 40_000_000, "eval")
    draw_inputs(out, options, test)
    try:
        adapter = train(out, options)
    except RagTurboError as error:
        raise SystemExit(str(error)) from error
    print("\nTest")
    log = logging.getLogger("ragturbo")
    level = log.level
    # A Generator warns of each word that the model does not know; here all prompts have one.
    log.setLevel(logging.ERROR)
    try:
        scores = measure(out, test, adapter)
    finally:
        log.setLevel(level)
    for name, score in scores.items():
        print(f"{name:<40} {score['mean']:.3f} [{score['low']:.3f}, {score['high']:.3f}]")
    seconds = round(time.monotonic() - began)
    last = [json.loads(line) for line in (out / "run" / "stats.jsonl").read_text().splitlines()]
    losses = {name: [line[name] for line in (last[0], last[-1])] for name in ("distill", "hspace")}
    facts = {
        "options": json.loads((out / "example.json").read_text()),
        "scores": scores,
        "losses, first and last": losses,
    }
    # Other programs on the machine lengthen the time, but hardly the processor's.
    facts |= {"seconds": seconds, "cpu_seconds": round(time.process_time()), "load": os.getloadavg()}
    facts |= {"resumed": resumed, "context": describe()}
    (out / "result.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"\n{seconds} s. Pictures: {out / 'grid.png'}. Draw another prompt:")
    database = ("--database", str(out / "test-database"), "--retriever", "hybrid")
    print(shlex.join(["ragturbo", "generate", test[0].caption, "--adapter", str(adapter), *database]))


if __name__ == "__main__":
    main()
