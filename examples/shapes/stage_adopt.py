"""Copy tokenizer, text encoder and autoencoders of the embedded model, with their provenance, instead of training them.

Its teacher and its student become the initial weights of the next ones. This saves the first stages if only the UNets
are retrained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from settings import Settings
from stage_student import START as STUDENT_START
from stage_teacher import START

import ragturbo

EMBEDDED = Path(ragturbo.__file__).parent / "assets" / "shapes"
PARTS = ("tokenizer", "text_encoder", "vae", "vae_tiny")
STAGES = ("text", "vae", "decoder", "tiny")


def adopt(work: Path, s: Settings, minutes: float | None = None, source: Path = EMBEDDED) -> None:
    for part in PARTS:
        shutil.copytree(source / part, work / part, dirs_exist_ok=True)
    shutil.copytree(source / "teacher_unet", work / START, dirs_exist_ok=True)
    shutil.copytree(source / "unet", work / STUDENT_START, dirs_exist_ok=True)
    stages = json.loads((source / "ragturbo.json").read_text())["provenance"]["stages"]
    for stage in STAGES:
        (work / f"{stage}.jsonl").write_text(json.dumps(stages[stage]) + "\n")
    for start, stage in ((START, "teacher"), (STUDENT_START, "student")):
        (work / f"{start}.jsonl").write_text(json.dumps(stages[stage]) + "\n")
