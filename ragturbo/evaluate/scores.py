"""Scores of single images, one line each in DIR/scores/<metric>/<system>-<rank>.jsonl; existing scores are kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from PIL import Image

from ragturbo.evaluate.images import Progress, json_lines, rank_and_world_size, read_images
from ragturbo.evaluate.suites import Prompt, Suite
from ragturbo.evaluate.systems import SystemSpec

CategoryCounts = dict[str, tuple[int, int]]
"""By category of question: (right answers, questions)."""


@dataclass(frozen=True)
class ImageScore:
    id: str
    value: float
    detail: CategoryCounts = field(default_factory=dict)


class Metric(Protocol):
    """Scores images against their prompts; higher is better."""

    name: str
    about: str
    """Library and weights, for the report."""

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[ImageScore]: ...


def score_images(
    metric: Metric, suite: Suite, spec: SystemSpec, out: Path, *, batch: int = 16, progress: Progress | None = None
) -> None:
    """Score every image of a system that has no score yet; under torchrun, every world-size-th image."""
    rank, world = rank_and_world_size()
    folder = out / "scores" / metric.name
    folder.mkdir(parents=True, exist_ok=True)
    scored = read_scores(out, metric.name, spec)
    mine = suite.prompts[rank::world]
    missing = [prompt for prompt in mine if prompt.id not in scored]
    path = folder / f"{spec.slug}-{rank}.jsonl"
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        rows = metric.score(part, list(read_images(part, spec, out)))
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        if progress is not None:
            progress(f"{metric.name} of {spec.text}", len(mine) - len(missing) + start + len(part), len(mine))


def read_scores(out: Path, metric: str, spec: SystemSpec) -> dict[str, ImageScore]:
    """Return the scores of a system by prompt id."""
    found: dict[str, ImageScore] = {}
    for path in sorted((out / "scores" / metric).glob(f"{spec.slug}-*.jsonl")):
        # The glob also matches systems whose name starts with this one's.
        if not path.stem.removeprefix(f"{spec.slug}-").isdigit():
            continue
        for row in json_lines(path):
            row["detail"] = {name: (right, asked) for name, (right, asked) in row["detail"].items()}
            found[row["id"]] = ImageScore(**row)
    return found


def right_share(counts: CategoryCounts) -> float:
    """Return the share of right answers: TIFA's score of an image."""
    return sum(right for right, _ in counts.values()) / max(1, sum(asked for _, asked in counts.values()))
