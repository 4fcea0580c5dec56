"""Instead of the first stages: the tokenizer, text encoder and autoencoders of the embedded model, with provenance, and
its teacher as the next one's start.

A better teacher and student can then be trained where time is short; the rest is good already.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from settings import Settings
from stage_teacher import START

import ragturbo

EMBEDDED = Path(ragturbo.__file__).parent / "assets" / "shapes"
PARTS = ("tokenizer", "text_encoder", "vae", "vae_tiny")
STAGES = ("text", "vae", "decoder", "tiny")


def adopt(work: Path, s: Settings, minutes: float | None = None, source: Path = EMBEDDED) -> None:
    for part in PARTS:
        shutil.copytree(source / part, work / part, dirs_exist_ok=True)
    shutil.copytree(source / "teacher_unet", work / START, dirs_exist_ok=True)
    stages = json.loads((source / "ragturbo.json").read_text())["provenance"]["stages"]
    for stage in STAGES:
        (work / f"{stage}.jsonl").write_text(json.dumps(stages[stage]) + "\n")
    (work / f"{START}.jsonl").write_text(json.dumps(stages["teacher"]) + "\n")
