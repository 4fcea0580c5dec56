"""The prompts of an evaluation. Every prompt has a permanent id, which determines its seed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
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
    """Reported separately: "common" and "rare" on the shapes suite."""
    meta: dict[str, Any] = field(default_factory=dict)
    """What a metric needs: TIFA's questions, the folder of a class."""

    @property
    def seed(self) -> int:
        return int.from_bytes(hashlib.blake2b(self.id.encode(), digest_size=4).digest(), "big")


@dataclass(frozen=True)
class Suite:
    name: str
    prompts: list[Prompt]
    metrics: tuple[str, ...]
    total: int
    """Number of prompts of the whole suite."""

    @property
    def title(self) -> str:
        if len(self.prompts) < self.total:
            return f"{self.name}, {len(self.prompts)} of {self.total} prompts"
        return f"{self.name}, {len(self.prompts)} prompts"

    def head(self, limit: int | None) -> Suite:
        """Return the suite with its first `limit` prompts."""
        if limit is not None and limit < 1:
            raise InvalidRequest(f"--limit {limit} leaves no prompt")
        return replace(self, prompts=self.prompts[:limit])


def shapes(count: int = 1000, seed: int = 20_260) -> Suite:
    """Unseen captions of the shapes world; every other one names a rare kind."""
    from ragturbo.evaluate.world import sample_scenes

    common = sample_scenes((count + 1) // 2, seed, "eval", rare=False)
    rare = sample_scenes(count // 2, seed, "eval", rare=True)
    prompts = []
    for i in range(count):
        group, scene = ("rare", rare[i // 2]) if i % 2 else ("common", common[i // 2])
        prompts.append(Prompt(f"{seed}-{i:05d}", scene.caption, group))
    return Suite("shapes", prompts, ("faithfulness",), count)


def coco(captions: Path, images: Path | None = None) -> Suite:
    """The first caption of each image in captions_val2017.json, ordered by image id; with `images` also FID."""
    data = _read_json(captions, "COCO captions (annotations/captions_val2017.json of annotations_trainval2017.zip)")
    first: dict[int, str] = {}
    try:
        for note in sorted(data["annotations"], key=lambda n: n["id"]):
            first.setdefault(note["image_id"], note["caption"])
    except (KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{captions} is not a COCO captions file: its annotations must have id, image_id and caption"
        ) from error
    prompts = [Prompt(f"{image:012d}", " ".join(caption.split())) for image, caption in sorted(first.items())]
    return Suite("coco", prompts, ("fid", "clip") if images else ("clip",), len(prompts))


def tifa(texts: Path, questions: Path) -> Suite:
    """TIFA's published tifa_v1.0_text_inputs.json and tifa_v1.0_question_answers.json."""
    rows = _read_json(texts, "TIFA's prompts (tifa_v1.0_text_inputs.json)")
    asked = _read_json(questions, "TIFA's questions (tifa_v1.0_question_answers.json)")
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    try:
        for question in asked:
            by_prompt.setdefault(str(question["id"]), []).append(
                {key: question[key] for key in ("question", "choices", "answer", "element_type")}
            )
        prompts = [
            Prompt(str(row["id"]), row["caption"], meta={"questions": by_prompt.get(str(row["id"]), [])})
            for row in rows
        ]
    except (KeyError, TypeError) as error:
        raise InvalidRequest(
            f"{questions} and {texts} are not TIFA's files: a prompt must have id and caption, and a question id, "
            "question, choices, answer and element_type"
        ) from error
    if unasked := [p.id for p in prompts if not p.meta["questions"]]:
        raise InvalidRequest(f"{questions} has no question for prompt {unasked[0]} ({len(unasked)} such prompts)")
    return Suite("tifa", prompts, ("tifa", "aesthetic"), max(len(prompts), TIFA_PROMPTS))


def classes(folder: Path, per_class: int = 4) -> Suite:
    """A folder with one folder of real images per class (ImageNet, iNaturalist, CUB, Aircraft)."""
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder; expected a folder of folders of real images")
    folders = sorted(child for child in folder.iterdir() if child.is_dir())
    kinds = [kind for kind in folders if any(path.suffix.lower() in IMAGE_SUFFIXES for path in kind.iterdir())]
    if not kinds:
        raise InvalidRequest(f"{folder} has no class folders with images")
    prompts = []
    for kind in kinds:
        # CUB's folders are named like "001.Black_footed_Albatross".
        name = kind.name.split(".", 1)[-1].replace("_", " ")
        text = f"a photo of a {name}"
        prompts += [Prompt(f"{kind.name}-{i}", text, meta={"class": str(kind)}) for i in range(per_class)]
    return Suite("classes", prompts, ("clip", "class-similarity"), len(prompts))


def text(path: Path) -> Suite:
    """One prompt per line; empty lines and lines that start with # are skipped."""
    lines = [line.strip() for line in _read_text(path, "prompts, one a line").splitlines()]
    kept = [line for line in lines if line and not line.startswith("#")]
    if not kept:
        raise InvalidRequest(f"{path} has no prompts")
    prompts = [Prompt(f"{i:06d}", line) for i, line in enumerate(kept)]
    return Suite("text", prompts, ("clip",), len(prompts))


def _read_json(path: Path, expected: str) -> Any:
    try:
        return json.loads(_read_text(path, expected))
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"{path} is not JSON: {error}") from error


def _read_text(path: Path, expected: str) -> str:
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise InvalidRequest(f"{path} {what}; expected {expected}")
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"{path} is not text in UTF-8; expected {expected}") from error
