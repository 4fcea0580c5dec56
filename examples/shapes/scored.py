"""One system's faithfulness on unseen captions as plain numbers; a run that was killed goes on with the next image."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from device import DEVICE

from ragturbo.evaluate.run import draw, settle, write_text
from ragturbo.evaluate.scores import Faithfulness, read_scores, score_all
from ragturbo.evaluate.suites import Suite
from ragturbo.evaluate.systems import Loading, open_system, parse_spec

TIMED = 30


def score(system: str, loading: Loading, suite: Suite, folder: Path, *, batch: int = 16) -> dict[str, Any]:
    """Values in the order of the suite's prompts; `group` says of each whether it is common or rare."""
    spec, metric = parse_spec(system), Faithfulness()
    settle(folder, suite, loading)
    draw(suite, spec, loading, folder, batch=batch, scorer=lambda prompt, image: metric.one(prompt, image).value)
    score_all(metric, suite, spec, folder)
    found = read_scores(folder, metric.name, spec)
    scored = [found[prompt.id] for prompt in suite.prompts]
    categories: dict[str, list[int]] = {}
    for one in scored:
        for name, (right, asked) in one.detail.items():
            held = categories.setdefault(name, [0, 0])
            held[0], held[1] = held[0] + right, held[1] + asked
    return {
        "system": system,
        "prompts": len(scored),
        "first_prompt": suite.prompts[0].id,
        "group": "".join(prompt.group[:1] for prompt in suite.prompts),
        "values": [round(one.value, 4) for one in scored],
        "categories": categories,
    }


def latency(system: str, loading: Loading, suite: Suite) -> dict[str, float]:
    """Milliseconds from a prompt to its image, one at a time, of the system as the scores used it."""
    drawn = open_system(parse_spec(system), loading)
    times = []
    try:
        for prompt in [suite.prompts[0], *suite.prompts[:TIMED]]:
            begun = time.perf_counter()
            drawn.draw([prompt.text], [prompt.seed], lambda i, image: 0.0)
            times.append(1e3 * (time.perf_counter() - begun))
    finally:
        drawn.close()
    # The first is the warm-up.
    low, middle, high = np.quantile(times[1:], (0.1, 0.5, 0.9)).round(2).tolist()
    return {"p10": low, "p50": middle, "p90": high, "count": len(times) - 1}


def record(path: Path, facts: dict[str, Any]) -> None:
    """Raw results with what made them, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({**facts, "made_by": made_by()}) + "\n")


def made_by() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if DEVICE.type == "cuda" else platform.processor() or platform.machine()
    return {
        "command": " ".join(["python", *sys.argv]),
        "commit": commit + ("+" if changed else ""),
        "machine": f"{machine}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
