"""Scores of single images, kept as they come: DIR/scores/<metric>/<system>.jsonl, one line an image.

A metric looks at a picture and its prompt and gives a value; questions answered, by category, go into `detail`. A run
that was killed goes on with the images that have no line yet.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ragturbo.evaluate.run import Place, Progress, image_path, json_lines
from ragturbo.evaluate.suites import Prompt, Suite
from ragturbo.evaluate.systems import Spec


@dataclass(frozen=True)
class Scored:
    id: str
    value: float
    detail: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By category: questions answered rightly, questions asked."""


class Metric(Protocol):
    """`name` as the table shows it; higher is better."""

    name: str
    about: str
    """Which weights and library made the number."""

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Scored]: ...


def score_all(
    metric: Metric,
    suite: Suite,
    spec: Spec,
    out: Path,
    *,
    batch: int = 16,
    progress: Progress | None = None,
    place: Place | None = None,
) -> None:
    place = place or Place.here()
    folder = out / "scores" / metric.name
    folder.mkdir(parents=True, exist_ok=True)
    there = read_scores(out, metric.name, spec)
    mine = place.mine(suite.prompts)
    missing = [prompt for prompt in mine if prompt.id not in there]
    path = folder / f"{spec.slug}-{place.rank}.jsonl"
    for start in range(0, len(missing), batch):
        part = missing[start : start + batch]
        images = []
        for prompt in part:
            with Image.open(image_path(out, spec, prompt)) as image:
                images.append(image.convert("RGB"))
        rows = metric.score(part, images)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)
        if progress is not None:
            progress(f"{metric.name} of {spec.text}", len(mine) - len(missing) + start + len(part), len(mine))


def read_scores(out: Path, metric: str, spec: Spec) -> dict[str, Scored]:
    """By prompt id."""
    found: dict[str, Scored] = {}
    for path in sorted((out / "scores" / metric).glob(f"{spec.slug}-*.jsonl")):
        # Another system's name may begin with this one's.
        if not path.stem.removeprefix(f"{spec.slug}-").isdigit():
            continue
        for row in json_lines(path):
            detail = {name: (int(right), int(asked)) for name, (right, asked) in row["detail"].items()}
            found[row["id"]] = Scored(row["id"], row["value"], detail)
    return found


class Faithfulness:
    """The shapes world's own exact check."""

    name = "faithfulness"
    about = "exact, by segmentation and shape matching; no learned model"

    def score(self, prompts: Sequence[Prompt], images: Sequence[Image.Image]) -> list[Scored]:
        return [self.one(prompt, image) for prompt, image in zip(prompts, images, strict=True)]

    def one(self, prompt: Prompt, image: Any) -> Scored:
        from ragturbo.evaluate.faithfulness import answers

        counts: dict[str, tuple[int, int]] = {}
        for question, answer in answers(prompt.text, image):
            right, asked = counts.get(question.category, (0, 0))
            counts[question.category] = (right + (answer == question.expected), asked + 1)
        return Scored(prompt.id, share(counts), counts)


def share(counts: dict[str, tuple[int, int]]) -> float:
    """TIFA's score of one image: right answers of all."""
    return sum(right for right, _ in counts.values()) / max(1, sum(asked for _, asked in counts.values()))
