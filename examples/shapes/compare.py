"""The paper's comparison in miniature: `python examples/shapes/compare.py --work build/compare`.

Every arm is trained by `ragturbo.train` on the same data for the same steps with the same losses, once a training seed,
and draws the same unseen captions from the same noise. A result that is there is not made again; a run that was killed
goes on at its last checkpoint. `compare_report.py` makes tables and plots of the results alone.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from device import DEVICE, attention
from scored import record, score

from ragturbo.evaluate.drawing import render
from ragturbo.evaluate.suites import Suite, shapes
from ragturbo.evaluate.systems import Loading
from ragturbo.evaluate.world import RARE, Scene, sample_scene
from ragturbo.model.bundle import TEACHER
from ragturbo.model.source import resolve
from ragturbo.train import LADDConfig, LADDTrainer, load_config
from ragturbo.train.encode import make_encoded_data
from ragturbo.train.neighbors import make_neighbors
from ragturbo.train.report import STATS
from ragturbo.train.teacher import make_teacher_data
from ragturbo.train.vgg_recipe import train_vgg

log = logging.getLogger("ragturbo.recipe")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "shapes" / "cpu-2core" / "comparison"


# Half of the rare kinds, one of each shape: no training data of any arm shows them, the database and the prompts do.
UNTAUGHT = frozenset(sorted(RARE)[1::2])

KEPT = ("step", "distill", "held_out", "held_out_alone", "lpips", "adv", "d_heads", "d_accuracy", "dead_heads",
        "skipped", "samples_per_s")  # fmt: skip


@dataclass(frozen=True)
class Arm:
    system: str
    """As `ragturbo eval` calls it."""
    changes: tuple[str, ...] | None = None
    """What differs from the configuration `shapes`; None: nothing is trained."""
    trained_as: str | None = None
    """The arm whose weights it draws with, where that is another."""


# In the order of what each decides, should time run out.
ARMS: dict[str, Arm] = {
    "student": Arm("student"),
    "slerp": Arm("slerp@w=0.8"),
    "slerp-best": Arm("slerp-best"),
    "best-of-9": Arm("best-of@n=9"),
    "teacher": Arm("teacher@guidance=3"),
    "lcm": Arm("diffusers@steps=4+guidance=1"),
    # The claim: the same, but for retrieval.
    "adapter": Arm("adapter", ()),
    "lora": Arm("none", ("student.adapter=none",)),
    # Controls.
    "wrong": Arm("wrong", trained_as="adapter"),
    "no-neighbours": Arm("none", trained_as="adapter"),
    "trained-wrong": Arm("wrong", ("student.neighbors=random",)),
    # The ablation the paper lacks.
    "adapter-only": Arm("adapter", ("student.lora.rank=0",)),
    "attention": Arm("adapter", ("student.adapter=attention",)),
    "lam-1": Arm("adapter@lam=1", ("student.lam=1.0",)),
    "k-2": Arm("adapter@k=2", ("student.num_neighbors=2",)),
    "k-4": Arm("adapter@k=4", ("student.num_neighbors=4",)),
}


def make_data(args: argparse.Namespace) -> None:
    """Teacher latents with their noise, real pictures without, their neighbours, and a latent LPIPS: each once."""
    teacher, work = args.teacher or args.model, args.work / "data"
    shared: dict[str, Any] = {"batch": 64, "shard_size": 256, "store_text": True, "device": str(DEVICE)}
    plan = {"model": teacher, "guidance": 3.0, "steps": args.teacher_steps, "precision": "bfloat16", **shared}
    for name, count, seed in (("teacher", args.pairs, 41), ("held-out", args.held_out, 43)):
        make_teacher_data([scene.caption for scene in taught(count, seed)], work / name, **plan)
    if not (work / "real" / "neighbors").is_dir():
        pictures = [(scene.caption, render(scene)) for scene in taught(args.real, 42)]
        make_encoded_data(pictures, work / "real", model=args.model, min_size=1, **shared)
    for source in ("teacher", "held-out", "real"):
        make_neighbors(work / source, args.database, model=args.model, k=4, device=str(DEVICE))
    if not (work / "vgg.safetensors").exists():
        result = train_vgg(
            work / "teacher", work / "vgg.safetensors", width=8, steps=args.lpips_steps, device=str(DEVICE)
        )
        log.info("latent LPIPS: %s", result)


def taught(count: int, seed: int) -> list[Scene]:
    """The first `count` training scenes of a seed that show no untaught kind."""
    scenes = (sample_scene(i, "train") for i in itertools.count(seed * 1_000_000))
    return list(itertools.islice((scene for scene in scenes if UNTAUGHT.isdisjoint(scene.meaning.kinds)), count))


@dataclass(frozen=True)
class Setting:
    changes: tuple[str, ...]
    seed: int


def training(args: argparse.Namespace, setting: Setting) -> LADDConfig:
    """The configuration `shapes` on this model and this data, but for the changes."""
    data = args.work / "data"
    sources = f"[{{path: {data / 'teacher'}, weight: 3}}, {{path: {data / 'real'}, weight: 1}}]"
    own = [
        f"model={args.model}", f"database={args.database}", f"seed={setting.seed}", f"data.sources={sources}",
        f"data.held_out={data / 'held-out'}", f"loss.lpips_weights={data / 'vgg.safetensors'}",
        *([f"teacher={args.teacher}"] if args.teacher else []),
    ]  # fmt: skip
    return load_config("shapes", [*own, *setting.changes])


def train(name: str, seed: int, args: argparse.Namespace) -> tuple[Path, dict[str, Any]]:
    """The exported folder of an arm's run, and what the run said on its way."""
    out = args.work / "runs" / f"{name}-{seed}"
    config = training(args, Setting((f"loop.max_steps={args.steps}", *(ARMS[name].changes or ()), *args.set), seed))
    begun, cpu = time.monotonic(), time.process_time()
    with attention():
        trainer = LADDTrainer(config, out, device=DEVICE, resume=True)
        folder = trainer.train()
    rows = [json.loads(line) for line in (out / STATS).read_text("utf-8").splitlines()]
    every = max(1, len(rows) // 40)
    told = [row for i, row in enumerate(rows) if i % every == 0 or "held_out" in row or row is rows[-1]]
    said = [{key: _short(row[key]) for key in KEPT if key in row} for row in told]
    facts = {
        "changes": list(ARMS[name].changes or ()),
        "set": args.set,
        "steps": trainer.step,
        "batch": config.loop.batch,
        "seconds": round(time.monotonic() - begun, 1),
        # What it takes, whoever else was on the machine.
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "stats": said,
    }
    return folder, facts


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _short(v) for name, v in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def measure(name: str, seed: int | None, args: argparse.Namespace, suite: Suite) -> None:
    arm = ARMS[name]
    label = name if seed is None else f"{name}-{seed}"
    path = args.results / f"{label}.json"
    if path.exists():
        return
    log.info("%s", label)
    facts: dict[str, Any] = {"arm": name, "seed": seed}
    adapter: Any = False
    if seed is not None:
        adapter, facts["training"] = train(arm.trained_as or name, seed, args)
    model, system = str(args.model), arm.system
    if name == "lcm":
        system = system.replace("@", f":{lcm_folder(args)}@", 1)
    elif name == "teacher" and args.teacher:
        system = system.replace("@", f":{args.teacher}@", 1)
    loading = Loading(model, str(args.database), None if adapter is False else str(adapter), str(DEVICE))
    begun = time.monotonic()
    facts |= score(system, loading, suite, args.work / "drawn" / label)
    # A folder's name is this machine's business.
    facts["system"] = arm.system
    record(path, {**facts, "seconds": round(time.monotonic() - begun, 1)})


def lcm_folder(args: argparse.Namespace) -> Path:
    """The recipe's consistency model as a pipeline of diffusers: the bundle with its UNet and LCM's scheduler."""
    from diffusers import EulerDiscreteScheduler, LCMScheduler

    folder, own = args.work / "lcm", resolve(args.model)
    shutil.rmtree(folder, ignore_errors=True)
    leave = shutil.ignore_patterns("database", TEACHER, "decoder_lora", "adapter.safetensors")
    shutil.copytree(own, folder, ignore=leave)
    shutil.rmtree(folder / "unet")
    shutil.copytree(args.lcm, folder / "unet")
    config = EulerDiscreteScheduler.from_pretrained(own / "scheduler").config
    LCMScheduler.from_config(config, original_inference_steps=50).save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "LCMScheduler"]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What every command on this data takes."""
    parser.add_argument("--work", type=Path, default=Path("build/compare"), help="data, checkpoints and images")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--teacher", help="a bundle with the teacher, where the model has no teacher_unet/")
    parser.add_argument("--database", help="default: the model's own")
    parser.add_argument("--pairs", type=int, default=16_384, help="teacher latents")
    parser.add_argument("--held-out", type=int, default=256, help="teacher latents that are not trained on")
    parser.add_argument("--real", type=int, default=4096, help="true pictures")
    parser.add_argument("--teacher-steps", type=int, default=20)
    parser.add_argument("--lpips-steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())


def settle_database(args: argparse.Namespace) -> None:
    if args.database is None:
        args.database = resolve(args.model) / "database"


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="one JSON an arm and seed")
    parser.add_argument("--lcm", type=Path, help="the recipe's lcm_unet/; without it there is no such row")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds")
    parser.add_argument("--prompts", type=int, default=1000, help="unseen captions, every other one rare")
    parser.add_argument("--steps", type=int, default=600, help="optimiser steps a run")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further settings of every run")
    add_model_options(parser)
    args = parser.parse_args(arguments)
    settle_database(args)
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    suite = shapes(args.prompts)
    plain = [name for name in args.arms if ARMS[name].changes is None and ARMS[name].trained_as is None]
    for name in plain:
        if name != "lcm" or args.lcm:
            measure(name, None, args, suite)
    trained = [name for name in args.arms if name not in plain]
    if trained:
        make_data(args)
    # Seed by seed: whenever it is stopped, every arm has as many seeds as there was time for.
    for seed in args.seeds:
        for name in trained:
            measure(name, seed, args, suite)


if __name__ == "__main__":
    main()
