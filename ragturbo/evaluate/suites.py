"""What is asked: a list of prompts, each with an id that is its own for ever, and how answers to them are scored."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ragturbo.errors import InvalidRequest

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TIFA_PROMPTS = 4081


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    group: str = ""
    """What the table reports apart: common and rare on shapes."""
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Fixed by the prompt's id: a shortened run draws the same images."""
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Suite:
    name: str
    prompts: list[Prompt]
    metrics: tuple[str, ...]
    total: int
    """How many prompts the whole suite has."""
    references: Path | None = None
    """A folder of real images, for FID."""

    @property
    def title(self) -> str:
        if len(self.prompts) < self.total:
            return f"{self.name}, {len(self.prompts)} of {self.total} prompts"
        return f"{self.name}, {len(self.prompts)} prompts"

    def head(self, limit: int | None) -> Suite:
        if limit is None or limit >= len(self.prompts):
            return self
        if limit < 1:
            raise InvalidRequest(f"--limit {limit} leaves no prompt")
        return Suite(self.name, self.prompts[:limit], self.metrics, self.total, self.references)


def shapes(count: int = 1000, seed: int = 20_260) -> Suite:
    """Unseen captions of the shapes world, the rare kinds in every other one."""
    from ragturbo.evaluate.world import sample_scenes

    common = sample_scenes((count + 1) // 2, seed, "eval", rare=False)
    rare = sample_scenes(count // 2, seed, "eval", rare=True)
    prompts = []
    for i, (group, scene) in enumerate(_interleave(common, rare)):
        prompts.append(Prompt(f"{seed}-{i:05d}", scene.caption, group))
    return Suite("shapes", prompts, ("faithfulness",), count)


def _interleave(common: Sequence[Any], rare: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for i in range(len(common)):
        yield "common", common[i]
        if i < len(rare):
            yield "rare", rare[i]


def coco(captions: Path, images: Path | None = None) -> Suite:
    """captions_val2017.json: the first caption of each image, images in the order of their ids."""
    data = _json(captions, "COCO captions (annotations/captions_val2017.json of annotations_trainval2017.zip)")
    first: dict[int, dict[str, Any]] = {}
    try:
        for note in sorted(data["annotations"], key=lambda n: n["id"]):
            first.setdefault(note["image_id"], note)
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"{captions} is no COCO captions file: {error!r}") from error
    prompts = [
        Prompt(f"{image:012d}", " ".join(note["caption"].split()), meta={"annotation_id": note["id"]})
        for image, note in sorted(first.items())
    ]
    return Suite("coco", prompts, ("fid", "clip") if images else ("clip",), len(prompts), images)


def tifa(texts: Path, questions: Path) -> Suite:
    """tifa_v1.0_text_inputs.json and tifa_v1.0_question_answers.json, as published."""
    rows = _json(texts, "TIFA's prompts (tifa_v1.0_text_inputs.json)")
    asked = _json(questions, "TIFA's questions (tifa_v1.0_question_answers.json)")
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    try:
        for question in asked:
            by_prompt.setdefault(str(question["id"]), []).append(
                {name: question[name] for name in ("question", "choices", "answer", "element_type")}
            )
        prompts = [
            Prompt(str(row["id"]), row["caption"], meta={"questions": by_prompt.get(str(row["id"]), [])})
            for row in rows
        ]
    except (KeyError, TypeError) as error:
        raise InvalidRequest(f"{questions} and {texts} are not TIFA's files: {error!r}") from error
    if silent := [p.id for p in prompts if not p.meta["questions"]]:
        raise InvalidRequest(f"{questions} has no question for prompt {silent[0]} ({len(silent)} such prompts)")
    return Suite("tifa", prompts, ("tifa", "aesthetic"), max(len(prompts), TIFA_PROMPTS))


def classes(folder: Path, template: str = "a photo of a {}", per_class: int = 4) -> Suite:
    """A folder of class folders of real images (ImageNet, iNaturalist, CUB, Aircraft …)."""
    kinds = sorted(child for child in _folder(folder).iterdir() if child.is_dir())
    kinds = [kind for kind in kinds if any(path.suffix.lower() in IMAGE_SUFFIXES for path in kind.iterdir())]
    if not kinds:
        raise InvalidRequest(f"{folder} has no folders of images, one a class")
    prompts = []
    for kind in kinds:
        # "001.Black_footed_Albatross" is how CUB names a folder.
        name = kind.name.split(".", 1)[-1].replace("_", " ")
        prompts += [
            Prompt(f"{kind.name}-{i}", template.format(name), meta={"class": str(kind)}) for i in range(per_class)
        ]
    return Suite("classes", prompts, ("clip", "class-similarity"), len(prompts))


def text(path: Path) -> Suite:
    """One prompt a line; empty lines and lines that begin with # are passed over."""
    try:
        lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{path} cannot be read as text: {error}") from error
    kept = [line for line in lines if line and not line.startswith("#")]
    if not kept:
        raise InvalidRequest(f"{path} has no prompts")
    prompts = [Prompt(f"{i:06d}", line) for i, line in enumerate(kept)]
    return Suite("text", prompts, ("clip",), len(prompts))


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise InvalidRequest(f"{path} is not a folder")
    return path


def _json(path: Path, what: str) -> Any:
    if not path.is_file():
        raise InvalidRequest(f"{path} is not there; it should be {what}")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error
