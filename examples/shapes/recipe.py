"""Train the embedded model from scratch: `python examples/shapes/recipe.py all --work build/shapes`.

The result is build/shapes/bundle. An interrupted stage resumes; all numbers are in settings.py.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path

import data
import torch
from device import DEVICE
from diffusers import AutoencoderKL
from networks import tokenizer_in
from settings import SIZES, Settings
from stage_adapter import ARMS, add_adapter, prepare_arms, train_arm
from stage_adopt import adopt
from stage_align import align, name_pairs
from stage_bundle import build_database, build_large_database, write_bundle
from stage_lcm import distil_lcm
from stage_student import distil_student, make_pairs
from stage_teacher import train_teacher
from stage_text import train_text
from stage_vae import train_decoder, train_tiny, train_vae


def draw(work: Path, s: Settings, minutes: float | None) -> None:
    data.draw(work, tokenizer_in(work / "tokenizer", s), s)


def encode(work: Path, s: Settings, minutes: float | None) -> None:
    data.encode(work, AutoencoderKL.from_pretrained(work / "vae").to(DEVICE).eval(), s)


STAGES: dict[str, Callable[[Path, Settings, float | None], None]] = {
    "adopt": adopt,
    "draw": draw,
    "text": train_text,
    "vae": train_vae,
    "encode": encode,
    "decoder": train_decoder,
    "tiny": train_tiny,
    "teacher": train_teacher,
    "pairs": make_pairs,
    "student": distil_student,
    "names": name_pairs,
    "align": align,
    "lcm": distil_lcm,
    "bundle": write_bundle,
    "database": build_database,
    "adapter": add_adapter,
    "database-large": build_large_database,
}


def compare_arms(work: Path, s: Settings, minutes: float | None) -> None:
    """Train every arm of the comparison with three seeds."""
    prepare_arms(work, s)
    for seed in (1, 2, 3):
        for arm in ARMS:
            train_arm(work, s, arm, seed)


STAGES["arms"] = compare_arms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", nargs="+", choices=[*STAGES, "all"])
    parser.add_argument("--work", type=Path, default=Path("build/shapes"), help="for checkpoints, caches and logs")
    parser.add_argument("--size", choices=SIZES, default="cpu", help="one of settings.SIZES")
    parser.add_argument("--minutes", type=float, help="stop a training stage after this time; run it again to continue")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    # "all" trains every part of the model; "adopt" would copy parts of the embedded one, and "arms" is an experiment.
    for name in [stage for stage in STAGES if stage not in ("adopt", "arms")] if "all" in args.stage else args.stage:
        logging.getLogger("ragturbo.recipe").info("stage %s", name)
        STAGES[name](args.work, SIZES[args.size], args.minutes)


if __name__ == "__main__":
    main()
