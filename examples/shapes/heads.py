"""What makes D's heads learn: `python examples/shapes/heads.py --work build/compare`, on compare.py's data.

The trainer itself, with the student held still: a head that says nothing stays at a hinge of 2. A variant whose JSON is
there is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import Setting, add_model_options, make_data, settle_database, training
from device import DEVICE, attention
from scored import record

from ragturbo.train import LADDTrainer
from ragturbo.train.report import STATS

log = logging.getLogger("ragturbo.recipe")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "shapes" / "cpu-2core" / "heads"
# Each is the configuration `shapes` but for what its name says.
VARIANTS: dict[str, tuple[str, ...]] = {
    "shapes.yaml": (),
    "teacher latents are real too": ("discriminator.real=all",),
    "no misaligned pairs": ("discriminator.misaligned=false",),
    "neither": ("discriminator.real=all", "discriminator.misaligned=false"),
    "raw features": ("discriminator.normalise=false",),
    "no spectral norm": ("discriminator.spectral_norm=false",),
    "lr 2e-4": ("discriminator.optim.lr=2e-4",),
    "lr 5e-3": ("discriminator.optim.lr=5e-3",),
    "batch 16": ("loop.batch=16", "loop.micro_batch=16"),
}


def measure(name: str, args: argparse.Namespace) -> None:
    path = args.results / f"{name.replace(' ', '-')}.json"
    if path.exists():
        return
    log.info("%s", name)
    still = (
        "optim.lr=0.0",
        "loop.precision=bf16",
        "loss.beta=0.0",
        "loop.log_every=10",
        "loop.sample_every=0",
        f"loop.max_steps={args.steps}",
    )
    with tempfile.TemporaryDirectory() as out, attention():
        LADDTrainer(training(args, Setting((*still, *VARIANTS[name]), 0)), out, device=DEVICE).train()
        rows = [json.loads(line) for line in (Path(out) / STATS).read_text("utf-8").splitlines()]
    said: list[dict[str, Any]] = [{key: row[key] for key in ("step", "d_heads", "d_accuracy")} for row in rows]
    record(path, {"variant": name, "changes": list(VARIANTS[name]), "stats": said})


def report(results: Path) -> str:
    """Each head's hinge, mean of the last three lines."""
    lines = []
    for path in (results / f"{name.replace(' ', '-')}.json" for name in VARIANTS):
        if path.exists():
            facts = json.loads(path.read_text("utf-8"))
            heads = list(facts["stats"][0]["d_heads"])
            if not lines:
                lines = [f"| variant | {' | '.join(heads)} |", f"|---{'|---' * len(heads)}|"]
            last = [np.mean([row["d_heads"][head] for row in facts["stats"][-3:]]) for head in heads]
            lines.append(f"| {facts['variant']} | {' | '.join(f'{value:.2f}' for value in last)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    add_model_options(parser)
    args = parser.parse_args(arguments)
    settle_database(args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    make_data(args)
    for name in args.variants:
        measure(name, args)
    print(report(args.results))


if __name__ == "__main__":
    main()
